"""mteb's tasks: data is kept while items are scored, rules are mteb's, a quick part is that of a local task."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import mteb
import numpy as np
import pytest
from datasets.exceptions import DatasetGenerationError
from mteb.abstasks import AbsTaskSTS
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from anchorembed.errors import InputError
from anchorembed.evaluate import local as local_module
from anchorembed.evaluate import mteb as mteb_module
from anchorembed.evaluate import quick
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.tasks import run_tasks
from anchorembed.model.embedder import Embedder
from judge import mteb_task, wrapped
from judged_files import FILES, scores, task_embedder


def test_data_that_mteb_loads_itself_is_held_until_items_are_scored(
    embedder: Embedder, data: Path, tmp_path: Path
) -> None:
    local = mteb_task(data / FILES["STS"])

    class Named(AbsTaskSTS):
        metadata = local.metadata

        def load_data(self, **_: object) -> None:
            self.dataset, self.data_loaded = local.dataset, True

    task = Named()
    (score,) = run_tasks(task_embedder(embedder, tmp_path), [wrapped(task)])
    assert len(score.items) == 30
    assert not task.data_loaded


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionError("Couldn't reach 'mteb/stsbenchmark-sts' on the Hub"),
        RuntimeError("Couldn't reach data that a script makes"),
        DatasetGenerationError("Couldn't reach its rows"),
    ],
)
def test_a_task_whose_data_cannot_be_had_says_so(
    fault: Exception, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = find_tasks(["STSBenchmark"])

    def unreachable(**_: object) -> None:
        raise fault

    monkeypatch.setattr(task.task, "load_data", unreachable)
    with pytest.raises(
        InputError, match=r"STSBenchmark: its data cannot be loaded .*Couldn't reach.*Check the network"
    ):
        next(run_tasks(task_embedder(embedder, tmp_path), [task]))


def test_a_task_with_rules_of_its_own_has_mteb_s_score_and_no_items(
    embedder: Embedder, data: Path, tmp_path: Path
) -> None:
    task = mteb_task(data / "beir")
    (kept,) = run_tasks(task_embedder(embedder, tmp_path), [wrapped(task)])
    task.ignore_identical_ids = True
    (score,) = run_tasks(task_embedder(embedder, tmp_path), [wrapped(task)])
    assert (len(kept.items), score.items) == (12, {})
    assert score.value == score.scores["test"][0]["main_score"] != pytest.approx(kept.value, abs=1e-4)


def test_a_part_of_a_reranking_task_of_mteb_has_its_own_queries_only(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = mteb_task(data / FILES["Reranking"])
    monkeypatch.setattr(quick, "QUICK_ITEMS", 3)
    monkeypatch.setattr(mteb, "get_task", lambda _: local)
    (score,) = run_tasks(task_embedder(embedder, tmp_path), find_tasks(["SomeReranking"], quick=True))
    assert (score.task, len(score.items)) == ("r_test-quick", 3)
    assert score.value == pytest.approx(score.scores["test"][0]["main_score"], abs=1e-4)


def test_a_part_of_a_retrieval_task_of_mteb_is_that_of_a_local_one(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (local_module, mteb_module):
        monkeypatch.setattr(module, "QUICK_DOCUMENTS", 20)
    monkeypatch.setattr(mteb, "get_task", lambda _: mteb_task(data / "beir"))
    ours, theirs = scores(embedder, tmp_path, data / "beir", quick=True) + scores(
        embedder, tmp_path, Path("SomeRetrieval"), quick=True
    )
    assert (ours.task, ours.items) == (theirs.task, theirs.items)


def test_a_part_of_a_retrieval_task_of_mteb_has_whole_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_module, "QUICK_DOCUMENTS", 20)
    local = mteb_task(data / "beir")
    (split,) = local.dataset["default"].values()
    split["queries"] = split["queries"].add_column("instruction", [f"only {name}" for name in split["queries"]["id"]])
    monkeypatch.setattr(mteb, "get_task", lambda _: local)
    (task,) = find_tasks(["SomeInstructionRetrieval"], quick=True)
    queries = task.task.dataset["default"]["test"]["queries"]
    assert len(queries) < 12
    assert queries["instruction"] == [f"only {name}" for name in queries["id"]]


def test_a_part_of_an_aggregate_of_mteb_is_of_the_tasks_in_it(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "QUICK_ITEMS", 10)
    local = mteb_task(data / FILES["STS"])

    class Aggregate(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="A", description="", tasks=[local], main_score="cosine_spearman", type="STS", eval_splits=["test"]
        )

    monkeypatch.setattr(mteb, "get_task", lambda _: Aggregate())
    (expected,) = scores(embedder, tmp_path, data / FILES["STS"], quick=True)
    for _ in range(2):  # with the same object in it
        (score,) = scores(embedder, tmp_path, Path("SomeAggregate"), quick=True)
        assert (score.task, score.value) == ("A-quick", pytest.approx(expected.value, abs=1e-4))
        assert local.metadata.name == "s_test"


def test_an_undefined_score_is_null_in_mteb_s_file(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(texts: Iterable[str], *_: object, **__: object) -> Iterator[np.ndarray]:
        yield np.eye(1, 32, dtype=np.float32).repeat(len(list(texts)), 0)

    monkeypatch.setattr(embedder, "stream", stream)
    task = wrapped(mteb_task(data / FILES["STS"]))
    for _ in range(2):
        (score,) = run_tasks(task_embedder(embedder, tmp_path), [task], tmp_path / "out")
        assert math.isnan(score.value)
    files = [file for file in (tmp_path / "out").rglob("*.json") if file.stem == task.name]
    assert len(files) == 1
    assert "NaN" not in files[0].read_text(encoding="utf-8")
    assert "null" in files[0].read_text(encoding="utf-8")
