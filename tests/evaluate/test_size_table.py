"""Smaller vectors are scored as they are compared once stored, by us and by mteb, and kept apart in results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorembed.api import evaluate
from anchorembed.data.beir import read_collection
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.metrics import measure_queries
from anchorembed.evaluate.ranking import rank
from anchorembed.evaluate.size_table import row, title
from anchorembed.evaluate.tasks import TaskScore, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import StoredPrecision, VectorFormat, cut, int8_ranges, quantize, restore
from anchorembed.search import vector_cache
from judge import judged
from judged_files import FILES, task_embedder

FORMATS = [VectorFormat(16), VectorFormat(16, "int8"), VectorFormat(32, "binary"), VectorFormat(8, "binary")]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_documents_are_stored_and_queries_are_not(
    form: VectorFormat, embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_cache, "_ROWS", 7)
    (score,) = run_tasks(replace(task_embedder(embedder, tmp_path), smaller=form), find_tasks([str(data / "beir")]))
    collection = read_collection(data / "beir")
    documents = cut(embedder.encode([document.text for document in collection.documents]), form.dimensions)
    queries = cut(embedder.encode([query.text for query in collection.queries], "query"), form.dimensions)
    known = replace(form, ranges=int8_ranges(documents) if form.precision == "int8" else None)
    ids = [query.id for query in collection.queries], [document.id for document in collection.documents]
    rankings = rank(queries, restore(quantize(documents, known), known), *ids)
    expected = measure_queries(rankings, collection.qrels, ["ndcg_at_10"])["ndcg_at_10"]
    assert score.form == form
    assert score.items == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_mteb_scores_smaller_vectors_alike(kind: str, embedder: Embedder, data: Path, tmp_path: Path) -> None:
    for form in (VectorFormat(16, "int8"), VectorFormat(24, "binary")):
        ours = replace(task_embedder(embedder, tmp_path), smaller=form)
        (score,) = run_tasks(ours, find_tasks([str(data / FILES[kind])]))
        theirs, _ = judged(data / FILES[kind], ours)
        assert theirs.form == form
        assert theirs.value == pytest.approx(score.value, abs=1e-5)


@pytest.mark.slow
def test_stored_vectors_of_every_task_are_smaller(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tasks score differently by fewer components, and nothing is embedded anew for it."""
    tasks = find_tasks([str(data / path) for path in FILES.values()])
    whole = list(run_tasks(task_embedder(embedder, tmp_path), tasks))
    monkeypatch.setattr(Embedder, "stream", lambda *_, **__: pytest.fail("embedded again"))
    for precision in ("float32", "int8", "binary"):
        form = VectorFormat(8, precision)  # type: ignore[arg-type]
        small = list(run_tasks(replace(task_embedder(embedder, tmp_path), smaller=form), tasks))
        assert sum(a.value != b.value for a, b in zip(whole, small, strict=True)) >= 4
    full = replace(task_embedder(embedder, tmp_path), smaller=VectorFormat(32))
    assert [score.value for score in run_tasks(full, tasks)] == [score.value for score in whole]
    near = list(run_tasks(replace(full, smaller=VectorFormat(32, "int8")), tasks))
    np.testing.assert_allclose([s.value for s in near], [s.value for s in whole], atol=0.1)


def test_results_of_each_format_are_kept_apart(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = (tiny_folder, [data / "beir"])
    options: Any = {"out": tmp_path / "out", "dimensions": [32, 16], "precision": ["float32", "binary"]}
    first = evaluate(*arguments, **options)
    assert [str(score.form) for score in first] == ["32d-float32", "32d-binary", "16d-float32", "16d-binary"]
    files = sorted((tmp_path / "out").rglob("beir.json"))
    assert len({file.parents[0].name for file in files}) == len({file.parents[1].name for file in files}) == 4
    described = [json.loads(file.with_name("model_meta.json").read_text(encoding="utf-8")) for file in files]
    assert sorted(meta["embed_dim"] for meta in described) == [16, 16, 32, 32]
    monkeypatch.setattr(vector_cache.VectorCache, "vectors", lambda *_: pytest.fail("not read from the results"))
    assert [score.value for score in evaluate(*arguments, **options)] == [score.value for score in first]
    plain = evaluate(*arguments, out=tmp_path / "out")
    assert [score.value for score in plain] == [first[0].value]


@pytest.mark.parametrize(
    ("value", "dimensions", "precision", "shown"),
    [
        (0.5, 32, "float32", "32 float32 128 100.0% 0.5000 100.0%"),
        (0.25, 16, "int8", "16 int8 16 12.5% 0.2500 50.0%"),
        (float("nan"), 32, "binary", "32 binary 4 3.1% undefined -"),
    ],
)
def test_a_row_says_size_and_quality(value: float, dimensions: int, precision: StoredPrecision, shown: str) -> None:
    full = TaskScore("t", "STS", "Spearman", 0.5, {}, {}, VectorFormat(32))
    small = replace(full, value=value, form=VectorFormat(dimensions, precision))
    assert row(small, full).split() == shown.split()
    assert len(row(small, full)) == len(title(full).splitlines()[1])
    assert row(small, replace(full, value=-0.1)).split()[-1] == "-"
