"""Files and folders written whole or not at all, folders locked for one process, content hashes, the cache folder.

Content is written under a hidden name beside its target, and renamed once it is complete and on the disk. A full disk
or a missing permission is an InputError that names the target; nothing half-written stays.
"""

import errno
import gzip
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from anchorembed.errors import InputError, first_line, of_files

_log = logging.getLogger(__name__)
_FILE_RULES, _FOLDER_RULES = b"5", b"7"  # of content hashes; increase one when the same bytes are read otherwise


def cache_folder() -> Path:
    """Where downloads, converted data, indexes and locks are kept: ``$ANCHOREMBED_CACHE``, else the user's cache."""
    root = os.environ.get("ANCHOREMBED_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "anchorembed"
    return Path(root).expanduser()


# --- Written whole ---------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside ``target`` to write to; the file is renamed to ``target`` when the block ends well.

    Its name ends in the target's, so `hash_content` is the same for both.
    If ``target`` is a symbolic link, the link stays and the file it points to is written.

    Raises:
        InputError: if the file cannot be written, as on a full disk, or ``target`` is a folder or a device.
    """
    target = target.resolve()
    partial = target.with_name(f".partial-{uuid4().hex[:12]}-{target.name}")
    with _folder_made(target.parent, target), _errors_named(target, partial):
        if target.exists() and not target.is_file():  # as root, a device would be replaced
            raise InputError(f"{target}: not a regular file, so it cannot be replaced. Choose another output.")
        try:
            yield partial
            _sync(partial)
            partial.replace(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` to fill; it is renamed to ``target`` when the block ends well.

    An existing ``target`` can be read until then. It is replaced, or kept if writing fails. With ``new`` it is never
    replaced if it holds files.

    Raises:
        InputError: if the folder cannot be written, as on a full disk.
    """
    target = target.resolve()
    partial = _hidden_beside(target, "partial")
    with _folder_made(target.parent, target), _errors_named(target, partial):
        try:
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            if new:
                partial.rename(target)
            else:
                _rename_over(partial, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_file(target: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; raises InputError as `whole_file` does."""
    with whole_file(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(target: Path, *read: str | Path | None) -> None:
    """Raise InputError, before any work, if a path cannot be written as a file, or is one of those that are read."""
    if target.is_dir():
        raise InputError(f"{target}: it is a folder. Name a file.")
    if target.exists() and any(path and Path(path).exists() and target.samefile(path) for path in read):
        raise InputError(f"{target}: this file is also read. Name another file to write.")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{target}: {parent} cannot be written to. Name another folder.")


def check_outside(target: Path, paths: Iterable[str | Path]) -> None:
    """Raise InputError if a path to write is in a folder among those that are read: it would be read, too."""
    for path in map(Path, paths):
        if target.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{target}: it is in {path}, all of which is read. Name a place outside it.")


def to_json(value: object, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """A value as JSON; NaN and infinite numbers, such as undefined scores, become null, which every parser accepts."""
    return json.dumps(_defined(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _defined(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(target: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line, gzipped if the name ends in .gz; return the number of rows.

    The same rows give the same bytes. Raises InputError as `whole_file` does.
    """
    count = 0
    with whole_file(target) as partial, partial.open("wb") as raw:
        # Without file name and time stamp in the gzip header.
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if target.suffix.lower() == ".gz" else raw
        with TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count


@contextmanager
def _folder_made(folder: Path, target: Path) -> Iterator[None]:
    """Make a folder and its parents for ``target``; new folders that stay empty are removed afterwards."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(target, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


@contextmanager
def _errors_named(target: Path, partial: Path) -> Iterator[None]:
    """Turn an error of writing ``partial`` into an InputError that names ``target``; let other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not of_files(error):
            raise
        path = getattr(error, "filename", None)  # the error of a full disk names no file
        if isinstance(path, str | os.PathLike):
            path = Path(path)
            if path != target and not path.is_relative_to(partial) and not partial.is_relative_to(path):
                raise
        raise _cannot_be_written(target, error) from error


def _cannot_be_written(target: Path, error: Exception) -> InputError:
    return InputError(f"{target}: cannot be written ({first_line(error)}). Free space or choose another output.")


def _rename_over(new: Path, target: Path) -> None:
    """Rename a folder to ``target``; an existing ``target`` is set aside, and put back if the renaming fails."""
    older = _hidden_beside(target, "older")
    with suppress(FileNotFoundError):
        target.rename(older)
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            if older.exists():
                older.rename(target)
            raise
        _rename_over(new, target)  # another process has written it meanwhile
    shutil.rmtree(older, ignore_errors=True)


def _hidden_beside(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.{purpose}")


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; Windows can flush files only."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Locked ----------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder, made if it does not exist, against other processes until the block, or this process, ends.

    ``wait`` until another process has unlocked it.

    The lock file is in the cache, never in the locked folder. New folders that stay empty are removed.
    Where the cache's file system has no locks, a warning says so and nothing is locked.

    Raises:
        InputError: if another process has locked the folder, unless ``wait``, or it cannot be made.
    """
    path = cache_folder() / "locks" / f"{hash_texts([str(folder.resolve())])[:32]}.lock"
    lock = FileLock(path)
    with _folder_made(folder, folder), _folder_made(path.parent, path):
        _acquire(lock, folder, wait)
        try:
            yield
        finally:
            lock.release()


def _acquire(lock: FileLock, folder: Path, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
        if isinstance(lock, SoftFileLock):  # filelock's fallback, which a killed process would never release
            lock.release()
            raise OSError("no advisory locks")
    except Timeout as error:
        if wait:
            _log.info("%s: waiting for another process that is at work there", folder)
            lock.acquire()
            return
        raise InputError(f"{folder}: another process is at work there. Wait for it, or stop it.") from error
    except OSError as error:
        _log.warning("%s: cannot be locked (%s). See that no other process works there.", folder, first_line(error))


# --- Hashed ----------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_content(path: Path) -> str:
    """Content hash of a file, or of all files in a folder with their names: 32 hexadecimal digits.

    A file's suffixes are part of its hash, because they decide how it is read.

    Raises:
        InputError: if there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check the path; a relative one counts from where you run.")
    digest = hashlib.sha256(_FOLDER_RULES if path.is_dir() else _FILE_RULES)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path) if path.is_dir() else path.suffixes}".encode())
            digest.update(bytes.fromhex(hash_file(file)))
    return digest.hexdigest()[:32]


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts joined end to end, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogatepass"))
    return digest.hexdigest()
