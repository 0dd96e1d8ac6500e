"""Files and folders are written whole or not at all, one process locks a folder, equal content has equal hashes."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anchorembed.api import encode, mine, page
from anchorembed.errors import InputError
from anchorembed.fit import fit
from anchorembed.system.files import (
    cache_folder,
    hash_content,
    hash_file,
    hash_texts,
    lock_folder,
    to_json,
    whole_file,
    whole_folder,
    write_file,
    write_jsonl,
)

FULL = OSError(errno.ENOSPC, "No space left on device")
ROWS = [{"text": "☃"}, {"text": "no\nway", "number": 1}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write(folder: Path, text: str) -> None:
    (folder / "file").write_text(text, encoding="utf-8")


def test_a_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    folder, refused = tmp_path / "new" / "inner", pytest.raises(InputError, match="another process is at work")
    with lock_folder(folder), refused, lock_folder(folder):
        pass
    with lock_folder(folder):
        pass
    assert not (tmp_path / "new").exists()


HOLDER = """
import sys
from pathlib import Path
from anchorembed.system.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=-1, stdout=-1, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=r"run: another process is at work there\. Wait for it, or stop it\."):
        lock_folder(folder).__enter__()
    holder.kill()
    holder.communicate()
    with lock_folder(folder):
        pass


def test_the_lock_lies_in_no_folder_of_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    with lock_folder(folder):
        assert names(tmp_path) == ["cache", "results"]
        assert names(folder) == []
        _write(folder, "kept")
    assert names(folder) == ["file"]
    assert cache_folder() == tmp_path / "cache"


def test_the_cache_may_be_named_by_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of settings names it, which no shell reads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, folder in (("~/mine", "mine"), ("", ".cache/anchorembed")):
        monkeypatch.setenv("ANCHOREMBED_CACHE", named)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert cache_folder() == tmp_path / folder


def test_other_folders_are_not_locked_but_the_same_by_another_path_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with lock_folder(tmp_path / "one"), lock_folder(tmp_path / "two"), pytest.raises(InputError, match="at work"):
        lock_folder(tmp_path / "link" / "one").__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_only_warns(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path / "run"):
        _write(tmp_path / "run", "written")
    assert "run: cannot be locked" in caplog.text
    assert "See that no other process works there." in caplog.text


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        _write(folder, "old")

    def fail() -> None:
        with whole_folder(target) as folder:
            _write(folder, "half")
            assert (target / "file").read_text(encoding="utf-8") == "old", "readable until the new one is there"
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"):
        fail()
    assert (target / "file").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_folder_is_replaced_with_all_that_was_in_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        _write(folder, "old")
        (folder / "of the old").touch()
    with whole_folder(target) as folder:
        _write(folder, "new")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["file"]
    assert (target / "file").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("failing", ["partial", "model"])
def test_a_folder_that_cannot_be_renamed_changes_nothing(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        _write(folder, "old")
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name.endswith(failing):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, to)

    def replace() -> None:
        with whole_folder(target) as folder:
            _write(folder, "new")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match=r"model: cannot be written \(\[Errno 13\] Permission denied"):
        replace()
    assert names(tmp_path) == ["model"]
    assert (target / "file").read_text(encoding="utf-8") == "old"


def test_a_folder_that_another_process_writes_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename, others = tmp_path / "model", Path.rename, [1, 2]

    def meanwhile(path: Path, to: Path) -> Path:
        if to == target and others:
            others.pop()
            with whole_folder(target) as folder:
                _write(folder, "another's")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", meanwhile)
    with whole_folder(target) as folder:
        _write(folder, "mine")
    assert not others
    assert names(tmp_path) == ["model"]
    assert (target / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appears_where_a_new_folder_is_written_is_kept(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    appeared = target / "precious" if kind == "folder" else target

    def write() -> None:
        with whole_folder(target, new=True) as folder:
            _write(folder, "mine")
            appeared.parent.mkdir(exist_ok=True)
            appeared.write_text("theirs", encoding="utf-8")

    with pytest.raises(InputError, match="model: cannot be written"):
        write()
    assert appeared.read_text(encoding="utf-8") == "theirs"
    assert names(tmp_path) == ["model"]


@contextmanager
def _in_folder(target: Path) -> Iterator[Path]:
    with whole_folder(target) as folder:
        yield folder / "file"


@pytest.mark.parametrize("whole", [whole_file, _in_folder])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_one_message_and_leaves_what_was_there(
    tmp_path: Path, whole: Callable[[Path], Any], exists: bool
) -> None:
    target = tmp_path / "new" / "data.bin"
    if exists:
        with whole(target) as path:
            path.write_bytes(b"old")
    before = hash_content(tmp_path / "new") if exists else ""

    def fail() -> None:
        with whole(target) as path:
            path.write_bytes(b"half")
            raise FULL

    with pytest.raises(InputError, match=r"data\.bin: cannot be written \(\[Errno 28\] No space left on device\)\. "):
        fail()
    assert (hash_content(tmp_path / "new") if (tmp_path / "new").exists() else "") == before
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_where_nobody_may_write_the_target_is_named(tmp_path: Path, whole: Callable[[Path], Any]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/below/target: cannot be written \(\[Errno 20\] Not a directory"):
        whole(tmp_path / "file" / "below" / "target").__enter__()
    with pytest.raises(InputError, match=r"file/below: cannot be written"):
        lock_folder(tmp_path / "file" / "below").__enter__()


@pytest.mark.parametrize("whole", [whole_file, _in_folder])
def test_what_a_link_leads_to_is_written(tmp_path: Path, whole: Callable[[Path], Any]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    for content in (b"old", b"new"):
        with whole(tmp_path / "link") as path:
            path.write_bytes(content)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["target"]
    written = tmp_path / "disk" / "target"
    assert (written / "file" if written.is_dir() else written).read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_neither_pipe_nor_folder_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in names(tmp_path):
        with pytest.raises(InputError, match=f"{name}: not a regular file, so it cannot be replaced"):
            write_file(tmp_path / name, "text")
    assert names(tmp_path) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "overwrite",
    [
        pytest.param(lambda read, out: encode("model", read, out), id="encode-texts"),
        pytest.param(lambda read, out: encode("model", "none.jsonl", out, like=read), id="encode-like"),
        pytest.param(mine, id="mine-pairs"),
        pytest.param(lambda read, out: mine("none.jsonl", out, corpus=read), id="mine-corpus"),
        pytest.param(lambda read, out: page(read, out=out), id="page-recipe"),
        pytest.param(lambda read, out: page("run", pairs=read, out=out), id="page-pairs"),
        pytest.param(lambda read, out: fit(read, "model", out.parents[1]), id="fit-corpus"),
    ],
)
@pytest.mark.parametrize("is_link", [False, True])
def test_no_verb_writes_over_what_it_reads(
    overwrite: Callable[[Path, Path], Any], is_link: bool, tmp_path: Path
) -> None:
    out = tmp_path / "data" / "pairs.jsonl"
    read = tmp_path / "read.jsonl" if is_link else out
    write_jsonl(read, ROWS)
    if is_link:
        out.parent.mkdir()
        out.symlink_to(read)
    before = read.read_bytes()
    with pytest.raises(InputError, match=r"this file is also read\. Name another file"):
        overwrite(read, out)
    assert read.read_bytes() == before


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_error_of_another_file_is_not_the_target_s(tmp_path: Path, whole: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError, match="source"), whole(tmp_path / "target"):
        (tmp_path / "source").read_bytes()
    assert names(tmp_path) == []


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
@pytest.mark.parametrize("error", [OSError("no such model"), ConnectionResetError(errno.ECONNRESET, "Reset by peer")])
def test_an_error_of_a_network_is_not_the_target_s(
    tmp_path: Path, whole: Callable[[Path], Any], error: OSError
) -> None:
    with pytest.raises(OSError, match=str(error.strerror or error)), whole(tmp_path / "target"):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["text ☃\n", b"bytes\n\xff"])
def test_a_file_holds_what_was_written(tmp_path: Path, content: str | bytes) -> None:
    expected = content if isinstance(content, bytes) else content.encode()
    target = tmp_path / "new" / "file.txt.gz"
    for _ in range(2):
        write_file(target, content)
        assert target.read_bytes() == expected
    assert names(tmp_path / "new") == [target.name]
    with whole_file(target) as unfinished:
        unfinished.write_bytes(expected)
        assert hash_content(unfinished) == hash_content(target)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_an_interrupted_write_leaves_the_earlier_file(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, ROWS)
    before = (tmp_path / name).read_bytes()

    def breaks() -> Iterable[Mapping[str, object]]:
        yield {"query": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / name, breaks())
    assert (tmp_path / name).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_equal_content_has_equal_hashes_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_file(tmp_path / name / "sub" / "pairs.jsonl", "text")
    one, two = tmp_path / "a", tmp_path / "b"
    assert hash_content(one) == hash_content(two)
    assert hash_content(one / "sub" / "pairs.jsonl") == hash_content(two / "sub" / "pairs.jsonl")
    (two / "sub" / "pairs.jsonl").rename(two / "pairs.jsonl")
    assert hash_content(one) != hash_content(two), "names count"
    (two / "pairs.jsonl").rename(two / "pairs.csv")
    assert hash_content(one / "sub" / "pairs.jsonl") != hash_content(two / "pairs.csv"), "so does how it is read"
    assert hash_file(one / "sub" / "pairs.jsonl") == hash_file(two / "pairs.csv") == hash_texts(["te", "xt"])
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        hash_content(tmp_path / "nothing")


def test_json_has_null_where_a_number_is_none() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN"}}
    assert json.loads(to_json(value)) == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}}
    assert to_json({"a": "é"}, ensure_ascii=False) == '{"a": "é"}'
