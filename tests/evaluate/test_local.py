"""Local tests of every form are evaluated, trained by and compared, also where mteb is not installed.

For the latter a check runs in a process of its own, in which packages are hidden (`without.py`), and in those that it
starts.
"""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from anchorembed.data.beir import read_collection
from anchorembed.data.store import open_corpus
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.tasks import run_tasks
from anchorembed.model.embedder import Embedder
from forks_without import run_without
from judged_files import task_embedder, write_beir
from tiny import write_pairs

ROOT = Path(__file__).parents[2]
HIDDEN = ("mteb", "polars", "lancedb")
TYPES = ["Retrieval", "Reranking", "STS", "PairClassification", "Classification"]
TESTS = ("data/beir", "data/rerank", "data/sts", "data/pairs.jsonl", "data/classes")
RECIPE = f"""
data: {{{{sources: [{{{{name: p, path: train.jsonl}}}}], query_tokens: 16, document_tokens: 24, held_out: 4}}}}
model: {{{{name: {{model}}, precision: float32, device: cpu}}}}
reconstruct: {{{{steps: 2, batch_size: 4, warmup_steps: 1}}}}
contrast: {{{{steps: 2, batch_size: 4, warmup_steps: 1, evaluate_every: 1, evaluate_on: &tests [{", ".join(TESTS)}]}}}}
output: run
compare: {{{{arms: [base, both], declared: [], seeds: [0], collections: {{{{T: *tests}}}}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, data: Path, tiny_folder: Path) -> Path:
    """Test files of every type, pairs and a recipe."""
    write_pairs(tmp_path / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_folder), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_every_local_form_is_evaluated_and_what_is_missing_is_named(folder: Path, tiny_folder: Path) -> None:
    """A package that is needed would be missed: this shows that packages are hidden."""
    evaluate, hidden = ["evaluate", str(tiny_folder)], ",".join(HIDDEN)
    tests = [str(folder / test) for test in TESTS]
    done, missed, by_name = run_without(
        [
            (hidden, [*evaluate, *tests, "--json", "-o", str(folder / "out")]),
            ("sklearn", [*evaluate, *tests]),
            (hidden, [*evaluate, "SciFact"]),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == TYPES
    written = {path.stem for path in (folder / "out").rglob("*.json")}
    assert written == {"beir", "r_test", "s_test", "pairs", "c_test", "model_meta"}
    line = "sklearn: this package is not installed. To install it: pip install 'anchorembed[eval]'"
    assert (missed.returncode, missed.stderr.splitlines()[-1:]) == (2, [line]), missed.stderr
    line = (
        "SciFact: neither a folder nor a file here, and tasks by name are mteb's. "
        "mteb: this package is not installed. To install it: pip install 'anchorembed[mteb]'"
    )
    assert (by_name.returncode, by_name.stderr.splitlines()[-1:], by_name.stdout) == (2, [line], ""), by_name.stderr


@pytest.mark.slow
def test_training_and_comparing_measure(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text(f"from without import hide\nhide(*{HIDDEN!r})\n", encoding="utf-8")
    path = os.pathsep.join(map(str, (folder, ROOT / "tests" / "helpers", ROOT / "src")))
    environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "anchorembed", "compare", "recipe.yaml", "--results", "results"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    (log,) = folder.glob("run/*/both-*/seed-0/*/contrast/log.jsonl")
    measured = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert {"beir nDCG@10", "r_test MAP", "s_test Spearman", "pairs AP", "c_test accuracy"} <= set(measured)
    text = (folder / "results" / "results.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["kind"] for line in text.splitlines()].count("cell") == 2 * len(TYPES)
    assert (folder / "results" / "report.html").exists()


@pytest.mark.slow
def test_a_corpus_is_never_held_in_memory(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents: list[dict[str, object]] = [{"_id": str(n), "text": f"{n} " * 2000} for n in range(3000)]
    write_beir(tmp_path / "big", documents, [{"_id": "q", "text": "which"}], ["q\t7\t1"])
    size = (tmp_path / "big" / "corpus.jsonl").stat().st_size
    find_tasks([str(tmp_path / "big")])  # converts it; the rest must hold for a corpus that is there already as well
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    (task,) = find_tasks([str(tmp_path / "big")])
    lengths: list[int] = []

    def stream(texts: Iterable[str], *_: object, **__: object) -> Iterator[np.ndarray]:
        for text in texts:
            lengths.append(len(text))
            yield np.eye(1, 32, dtype=np.float32)

    monkeypatch.setattr(embedder, "stream", stream)
    list(run_tasks(task_embedder(embedder, tmp_path), [task]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(lengths) > 0.9 * size
    assert most + pa.total_allocated_bytes() - before < size / 3


@pytest.mark.parametrize("documents", [1, 3])
def test_a_revision_is_of_all_that_is_read(documents: int, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"_id": f"d{n}", "title": "T", "text": f" it's {n}"} for n in range(documents)]
    write_beir(tmp_path / "c", rows, [{"_id": "q", "text": "which"}], ["q\td0\t1"])
    read = read_collection(tmp_path / "c")
    whole = "\n".join(map(repr, (read.documents, read.queries, read.qrels)))
    for quick in (False, True):
        (task,) = find_tasks([str(tmp_path / "c")], quick=quick)
        assert task.revision == hashlib.sha256(whole.encode()).hexdigest()
    stored = open_corpus(tmp_path / "c" / "corpus.jsonl")
    assert [*stored] == [*read.documents]
    assert stored.ids == [document.id for document in read.documents]
