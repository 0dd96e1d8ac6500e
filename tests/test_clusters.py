"""Two Ray workers give what one process gives, also when one of them is killed."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from anchorembed.clusters import encode_by_ray
from anchorembed.embedder import Embedder
from anchorembed.errors import InputError
from anchorembed.records import read_texts
from anchorembed.verbs import encode

pytest.importorskip("ray")
TEXTS = 400


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = ({"_id": f"t{number}", "text": f"text number {number} " * (1 + number % 40)} for number in range(TEXTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kill_a_worker(vectors: Path, killed: list[int]) -> None:
    """Once the first part is there, kill the first worker found."""
    while not list(vectors.glob("part-*.parquet")):
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if any("ray::" in part and "Worker" in part for part in process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


def test_two_workers_of_whom_one_is_killed_give_what_one_process_gives(
    tmp_path: Path, tiny_folder: Path, texts: Path
) -> None:
    killed: list[int] = []
    done: list[int] = []
    out = tmp_path / "vectors"
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / ".vectors.work" / "vectors", killed), daemon=True)
    killer.start()
    rows = encode_by_ray(read_texts(texts), out, str(tiny_folder), workers=2, advance=done.append, part=5)
    killer.join(timeout=10)
    assert killed, "no worker was found to kill: the test shows nothing"
    assert rows == sum(done) == TEXTS
    assert encode(tiny_folder, texts, tmp_path / "plain.parquet") == TEXTS
    plain, parts = pq.read_table(tmp_path / "plain.parquet"), pq.read_table(out)
    assert parts.schema == plain.schema
    assert parts["id"].to_pylist() == plain["id"].to_pylist()
    ours, theirs = (np.stack(table["vector"].to_pylist()) for table in (parts, plain))
    assert (ours * theirs).sum(axis=1).min() > 0.999
    assert all(path.name.startswith("part-") and path.suffix == ".parquet" for path in out.iterdir())
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {"plain.parquet", "texts.jsonl", "vectors"}


def test_the_verb_writes_parts_and_refuses_a_folder_that_is_there(
    tmp_path: Path, tiny_folder: Path, texts: Path
) -> None:
    out = tmp_path / "vectors"
    assert encode(tiny_folder, texts, out, side="query", engine="ray", workers=1) == TEXTS
    expected = Embedder.load(tiny_folder).encode([document.text for document in read_texts(texts)], "query")
    assert np.allclose(np.stack(pq.read_table(out)["vector"].to_pylist()), expected, atol=2e-2)
    with pytest.raises(InputError, match="is there already"):
        encode(tiny_folder, texts, out, engine="ray")


def test_a_fault_in_a_worker_is_one_message_and_leaves_nothing(tmp_path: Path, tiny_folder: Path, texts: Path) -> None:
    with pytest.raises(InputError, match="leaves no room"):
        encode(tiny_folder, texts, tmp_path / "vectors", instruction="too long " * 200, engine="ray", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]
