"""Instructions go where they should, nothing is embedded twice, and results are kept in files that mteb reads."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from mteb.cache import ResultCache

from anchorembed.data.beir import read_collection
from anchorembed.errors import InputError
from anchorembed.evaluate.find import find_tasks, measure_on
from anchorembed.evaluate.mteb import MtebEncoder
from anchorembed.evaluate.tasks import check_instructions, read_instructions, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.search.vector_cache import VectorCache
from judge import mteb_task
from judged_files import task_embedder


def test_instructions_go_where_they_should(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(80, 80))
    tasks = find_tasks([str(data / "beir"), str(data / "sts")])
    plain = list(run_tasks(task_embedder(embedder, tmp_path), tasks))
    told = list(run_tasks(task_embedder(embedder, tmp_path, {"STS": "compare these"}), tasks))
    assert told[0].value == plain[0].value
    assert told[1].value != plain[1].value
    collection = read_collection(data / "beir")
    queries = embedder.encode([query.text for query in collection.queries], "query", "find")
    documents = embedder.encode([document.text for document in collection.documents])
    best = {
        query.id: collection.documents[int(row.argmax())].id
        for query, row in zip(collection.queries, queries @ documents.T, strict=True)
    }
    local, run = mteb_task(data / "beir"), MtebEncoder(task_embedder(embedder, tmp_path, {"beir": "find"}))
    run.index(Dataset.from_list([{"id": document.id, "text": document.text} for document in collection.documents]))
    rows = [{"id": query.id, "text": query.text} for query in collection.queries]
    found = run.search(rows, task_metadata=local.metadata, top_k=3)
    assert {query: next(iter(ranked)) for query, ranked in found.items()} == best
    with pytest.raises(InputError, match="'STSS' is no task here"):
        check_instructions({"STSS": "x"}, tasks)
    check_instructions({"STS": "x", "beir": "y", "default": "z"}, tasks)


def test_nothing_is_embedded_twice_and_results_are_kept(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tasks = find_tasks([str(data / "beir")])
    (first,) = run_tasks(task_embedder(embedder, tmp_path), tasks, out)
    (written,) = out.glob("results/anchorembed__tiny/*/beir.json")
    assert json.loads(written.read_text(encoding="utf-8"))["task_name"] == "beir"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(Embedder, "stream", refuse)
    (again,) = run_tasks(task_embedder(embedder, tmp_path), find_tasks([str(data / "beir")]))
    assert again.items == first.items
    (read,) = run_tasks(task_embedder(embedder, tmp_path / "elsewhere"), find_tasks([str(data / "beir")]), out)
    assert (read.value, read.items, read.scores) == (first.value, {}, first.scores)
    corpus = data / "beir" / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("sort", "read"), encoding="utf-8")
    with pytest.raises(AssertionError, match="embedded again"):
        list(run_tasks(task_embedder(embedder, tmp_path), find_tasks([str(data / "beir")]), out))


def test_mteb_reads_our_result_files(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    found = list(
        run_tasks(task_embedder(embedder, tmp_path), find_tasks([str(data / "sts"), str(data / "beir")]), tmp_path)
    )
    (results,) = ResultCache(tmp_path).load_results(require_model_meta=True).model_results
    assert results.model_name == "anchorembed/tiny"
    read = {result.task_name: result for result in results.task_results}
    for score in found:
        assert read[score.task].get_score() == pytest.approx(score.value)


def test_a_result_cut_short_is_made_again(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out", [str(data / "sts")]
    (first,) = run_tasks(task_embedder(embedder, tmp_path), find_tasks(names), out)
    (written,) = out.glob("results/anchorembed__tiny/*/s_test.json")
    whole = written.read_text(encoding="utf-8")
    written.write_text(whole[: len(whole) // 2], encoding="utf-8")
    (again,) = run_tasks(task_embedder(embedder, tmp_path), find_tasks(names), out)
    assert again.items == first.items
    assert json.loads(written.read_text(encoding="utf-8"))["task_name"] == "s_test"


def test_scores_come_one_by_one(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    tasks = find_tasks([str(data / "sts"), str(data / "beir")])
    assert next(run_tasks(task_embedder(embedder, tmp_path), tasks)).task == "s_test"
    assert [path.suffix for path in tmp_path.rglob("*.npy")] == [".npy"] * 2, "the second task was not begun"


def test_a_result_with_other_instructions_is_another(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(80, 80))
    values = [
        next(
            run_tasks(task_embedder(embedder, tmp_path, told), find_tasks([str(data / "sts")]), tmp_path / "out")
        ).value
        for told in ({}, {"default": "compare these"}, {"default": "which is longer"}, {})
    ]
    assert len(set(values[:3])) == 3
    assert values[3] == pytest.approx(values[0], abs=5.1e-6)


def test_instruction_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "instructions.yaml"
    path.write_text("default: Given a question\nSTS: Compare\n", encoding="utf-8")
    assert read_instructions(path) == {"default": "Given a question", "STS": "Compare"}
    for text in ("- a\n", "a: 1\n", "a: [\n", "STS: one\nSTS: other\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"instructions\.yaml"):
            read_instructions(path)


@pytest.fixture
def collapsed(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Embedder:
    """An embedder that gives every text the same vector."""

    def stream(texts: Iterable[str], *_: object, **__: object) -> Iterator[np.ndarray]:
        yield np.eye(1, 32, dtype=np.float32).repeat(len(list(texts)), 0)

    monkeypatch.setattr(embedder, "stream", stream)
    return embedder


def test_an_undefined_score_is_said_and_is_null_in_json(
    collapsed: Embedder, data: Path, tmp_path: Path, said: list[str]
) -> None:
    tasks = find_tasks([str(data / "sts"), str(data / "beir")])
    for _ in range(2):  # measured, and read from the file
        said.clear()
        undefined, defined = run_tasks(task_embedder(collapsed, tmp_path), tasks, tmp_path / "out")
        assert math.isnan(undefined.value)
        assert 0 <= defined.value <= 1
        assert said == ["s_test: Spearman is undefined, as the model gives all items the same score"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (written,) = (tmp_path / "out").rglob("s_test.json")
    result = json.loads(written.read_text(encoding="utf-8"), parse_constant=refuse)
    assert result["scores"]["test"][0]["main_score"] is None


def test_an_undefined_score_chooses_no_checkpoint(
    collapsed: Embedder, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        VectorCache, "vectors", lambda _, texts, *__: np.eye(1, 32, dtype=np.float32).repeat(len(texts), 0)
    )
    assert math.isnan(measure_on([str(data / "sts")])(collapsed)["s_test Spearman"])


@pytest.mark.parametrize(
    ("name", "what"), [("score", "scores that differ"), ("label", "pairs of label 0 and of label 1")]
)
def test_data_by_which_nothing_can_be_measured_are_refused(tmp_path: Path, name: str, what: str) -> None:
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", name: 1} for n in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match=rf"t: every {name} is 1, so nothing can be measured\. Give {what}"):
        find_tasks([str(tmp_path / "t.jsonl")])


@pytest.mark.parametrize("name", ["beir", "rerank", "sts", "pairs.jsonl", "classes"])
def test_vectors_that_are_not_finite_are_refused(
    embedder: Embedder, data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(texts: Iterable[str], *_: object, **__: object) -> Iterator[np.ndarray]:
        yield np.full((len(list(texts)), 32), np.nan, np.float32)

    monkeypatch.setattr(embedder, "stream", stream)
    with pytest.raises(InputError, match="it gives vectors that are not finite"):
        list(run_tasks(task_embedder(embedder, tmp_path), find_tasks([str(data / name)])))
