"""Two Ray workers give what one process gives, also when one of them is killed."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from anchorembed.api import encode
from anchorembed.data.documents import read_texts
from anchorembed.errors import InputError
from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.search import ray as encoding
from anchorembed.search.columns import read_made_by
from anchorembed.search.ray import Job, _share, encode_by_ray

ray = pytest.importorskip("ray")
TEXTS = 400


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = ({"_id": f"t{number}", "text": f"text number {number} " * (1 + number % 40)} for number in range(TEXTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_verb_writes_parts_like_a_file_and_refuses_a_folder_that_is_there(
    tmp_path: Path, tiny_folder: Path, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a cluster of its own, which is shut down; smaller vectors, by the ranges of those of one process."""
    assert not ray.is_initialized()
    plain, parts = tmp_path / "plain.parquet", tmp_path / "parts"
    encode(tiny_folder, texts, plain, side="query", dimensions=16, precision="int8")
    with pytest.raises(InputError, match="int8 needs the ranges of all vectors"):
        encode(tiny_folder, texts, parts, precision="int8", engine="ray")
    assert encode(tiny_folder, texts, parts, side="query", like=plain, engine="ray", workers=1) == TEXTS
    said = capfd.readouterr().err
    assert "Starting execution" not in said
    assert "Deprecat" not in said
    assert read_made_by(parts) == read_made_by(plain)
    assert pq.read_table(parts).schema == pq.read_table(plain).schema
    ours, theirs = (np.stack(pq.read_table(path)["vector"].to_pylist()) for path in (parts, plain))
    assert np.abs(ours - theirs).max() <= 8, "batches of another company round products of bfloat16 otherwise"
    with pytest.raises(InputError, match="is there already"):
        encode(tiny_folder, texts, parts, engine="ray")
    assert not ray.is_initialized()


def test_an_address_in_no_known_form_is_one_message(
    tmp_path: Path, tiny_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(InputError, match=r"RAY_ADDRESS: 'nonsense' is no address for Ray .* Set auto or HOST:PORT"):
        encode(tiny_folder, texts, tmp_path / "vectors", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """One cluster for several tests, each of which leaves it running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Once the first part is there, kill the first worker found."""
    while not list(folder.glob(".vectors.*/part-*.parquet")):
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if any("ray::" in part and "Worker" in part for part in process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_two_workers_of_whom_one_is_killed_give_what_one_process_gives(
    tmp_path: Path, tiny_folder: Path, texts: Path
) -> None:
    killed: list[int] = []
    done: list[int] = []
    out = tmp_path / "vectors"
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path, killed), daemon=True)
    killer.start()
    rows = encode_by_ray(read_texts(texts), out, Job(str(tiny_folder)), workers=2, progress=done.append, part=5)
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


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_fault_in_a_worker_is_one_message_and_leaves_nothing(
    tmp_path: Path, tiny_folder: Path, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="leaves no room"):
        encode(tiny_folder, texts, tmp_path / "vectors", instruction="too long " * 200, engine="ray", workers=1)
    assert "Exception occurred" not in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_an_unknown_engine_is_named(tmp_path: Path, tiny_folder: Path, texts: Path) -> None:
    with pytest.raises(InputError, match=r"engine: 'Ray' is unknown\. Use local or ray"):
        encode(tiny_folder, texts, tmp_path / "vectors", engine="Ray")  # type: ignore[arg-type]


def test_the_default_model_is_not_a_folder_of_its_name(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def run(_: object, __: object, arguments: tuple[Job, Path, Path], *rest: object) -> None:
        jobs.append(arguments[0].model)
        raise InputError("stop")

    monkeypatch.setattr(encoding, "_run", run)
    monkeypatch.setattr(encoding, "load_tokenizer", str)
    monkeypatch.chdir(tmp_path)
    for name in (DEFAULT_MODEL, "other"):
        Path(name).mkdir()
        with pytest.raises(InputError, match="stop"):
            encode(name, texts, tmp_path / "vectors", engine="ray")
    assert jobs == [DEFAULT_MODEL, str(tmp_path / "other")]


@pytest.mark.parametrize(
    ("machines", "workers", "expected"),
    [
        ([{"CPU": 4.0}] * 8, 1, (1, {"num_cpus": 4})),
        ([{"CPU": 4.0}] * 8, None, (8, {"num_cpus": 4})),
        ([{"CPU": 2.0}], 2, (2, {"num_cpus": 1})),
        ([{"CPU": 4.0}, {"CPU": 16.0}], 3, (3, {"num_cpus": 2})),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], None, (4, {"num_gpus": 1.0})),
        ([{"CPU": 8.0, "GPU": 1.0}], 2, (2, {"num_gpus": 0.5})),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, (3, {"num_gpus": 0.5})),
        ([{"memory": 1.0}, {"CPU": 16.0}, {"CPU": 16.0}], None, (2, {"num_cpus": 16})),
    ],
)
def test_what_a_worker_asks_for_fits_on_a_machine(
    machines: list[dict[str, float]], workers: int | None, expected: tuple[int, dict[str, float]]
) -> None:
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    cluster = SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 1.0}}])
    assert _share(cluster, workers) == expected
