"""Files written whole or not at all, folders locked for one process, content hashes, and the cache folder."""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from safetensors import SafetensorError

from anchorembed.errors import InputError

_VERSION = b"3"  # raised when the same file comes to be read otherwise: conversions are then made anew


def cache_folder() -> Path:
    """Where downloads and indexes are kept: ``$ANCHOREMBED_CACHE``, else the user's cache directory."""
    root = os.environ.get("ANCHOREMBED_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorembed"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line, gzipped if the name ends in .gz, whole or not at all; return the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # A fixed time stamp and no file name in the gzip header: the same rows give the same bytes.
    with whole_file(path) as partial, partial.open("wb") as raw:
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when all went well, and is gone otherwise."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as of a full disk: say which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """See that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_key(path: Path) -> str:
    """SHA-256 of a source's bytes, file by file, with what decides how they are read.

    Raises:
        InputError: if there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check data.sources; paths are relative to where you run.")
    digest = hashlib.sha256(_VERSION)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path) if path.is_dir() else path.suffixes}".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear at ``target`` only once ``fill`` has written all of it; an older one is replaced.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.rglob("*"):
            sync(file)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: cannot be written ({error}). Free space or choose another output.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(target: Path, content: str | bytes) -> None:
    """Make a file appear at ``target`` only once all of it is written; an older one is replaced."""
    with whole_file(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, so that no other process of this machine works there; its end lets go of it.

    What was made goes again if nothing was written into it. Where the file system has no locks, nothing is held.

    Raises:
        InputError: if another process holds it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another process is at work there. Wait for it, or stop it.") from error
        except OSError:
            warnings.warn(
                f"{folder}: its file system has no locks; see that no other process works there", stacklevel=3
            )
        yield
    finally:
        os.close(handle)
        with suppress(OSError):
            for place in made:
                place.rmdir()
