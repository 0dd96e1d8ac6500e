"""mteb as the judge of our scores: the data of local tests as tasks of its own kinds, scored by its own code."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores  # what mteb scores by, unrounded
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from anchorembed.data.beir import read_collection
from anchorembed.data.documents import Document
from anchorembed.data.evaluation_files import read_test_set
from anchorembed.evaluate.mteb import MtebEncoder, MtebTask
from anchorembed.evaluate.task_types import MAIN_METRICS
from anchorembed.evaluate.tasks import TaskEmbedder, TaskScore

BASES = {
    "Retrieval": AbsTaskRetrieval,
    "Reranking": AbsTaskRetrieval,
    "STS": AbsTaskSTS,
    "PairClassification": AbsTaskPairClassification,
    "Classification": AbsTaskClassification,
}


def wrapped(task: AbsTask) -> MtebTask:
    """A task of mteb as `find_tasks` returns it."""
    return MtebTask(task.metadata.name, task.metadata.type, str(task.metadata.dataset["revision"]), task)


def judged(path: Path, embedder: TaskEmbedder) -> tuple[TaskScore, dict[str, float]]:
    """What mteb says of a BEIR folder or test file, and each query's main score, unrounded."""
    task = mteb_task(path)
    return wrapped(task).run(embedder, None), unrounded(task, embedder) if isinstance(task, AbsTaskRetrieval) else {}


def unrounded(task: AbsTaskRetrieval, embedder: TaskEmbedder) -> dict[str, float]:
    """Each query's main score as mteb computes it before it rounds."""
    data, encoder = task.dataset["default"]["test"], MtebEncoder(embedder)
    encoder.index(data["corpus"])
    run = encoder.search(
        data["queries"], task_metadata=task.metadata, top_k=1000, top_ranked=data["top_ranked"] or None
    )
    name = {"ndcg_at_10": "ndcg_cut_10", "map_at_1000": "map_cut_1000"}[task.metadata.main_score]
    found = calculate_retrieval_scores(run, data["relevant_docs"], list(task.k_values)).all_scores
    return {query: scores[name] for query, scores in found.items()}


def mteb_task(path: Path) -> AbsTask:
    """A BEIR folder or test file as a task of mteb's."""
    if path.is_dir():
        read = read_collection(path)
        return _made("Retrieval", read.name, _search(read.documents, read.queries, read.qrels, None))
    test: Any = read_test_set(path)
    if test.kind == "Reranking":
        texts = sorted({text for row in test.rows for text in (*row.positives, *row.negatives)})
        names = {text: f"{number:06}" for number, text in enumerate(texts)}  # their order is no rule of ours
        qrels = {
            row.id: {names[text]: 0 for text in row.negatives} | {names[text]: 1 for text in row.positives}
            for row in test.rows
        }
        documents, queries = (
            [Document(names[text], text) for text in texts],
            [Document(r.id, r.query) for r in test.rows],
        )
        top = {query: list(grades) for query, grades in qrels.items()}
        return _made(test.kind, test.name, _search(documents, queries, qrels, top))
    if test.kind == "Classification":
        train: Any = read_test_set(path.with_name(path.name.replace("_test.", "_train.")))
        numbers = {label: number for number, label in enumerate(sorted({row.label for row in train.rows}))}
        parts = {
            name: {"text": [row.text for row in part.rows], "label": [numbers[row.label] for row in part.rows]}
            for name, part in (("train", train), ("test", test))
        }
        return _made(test.kind, test.name, _splits(parts))
    values = "score" if test.kind == "STS" else "labels"
    columns: dict[str, list[Any]] = {
        "sentence1": [row.first for row in test.rows],
        "sentence2": [row.second for row in test.rows],
        values: [row.value if values == "score" else int(row.value) for row in test.rows],
    }
    return _made(test.kind, test.name, _splits({"test": columns}))


def _made(kind: str, name: str, data: Any) -> AbsTask:
    metadata = TaskMetadata(
        name=name,
        description="local data",
        type=kind,
        dataset={"path": f"local/{name}", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["und-Zyyy"],
        main_score=MAIN_METRICS[kind][0],
    )
    task = type("Made", (BASES[kind],), {"metadata": metadata, "samples_per_label": 8, "n_experiments": 10})()
    task.dataset, task.data_loaded = data, True
    return task


def _search(documents: Any, queries: Any, qrels: Any, top: Any) -> Any:
    corpus, asked = (
        Dataset.from_dict({"id": [one.id for one in side], "text": [one.text for one in side]})
        for side in (documents, queries)
    )
    return {"default": {"test": {"corpus": corpus, "queries": asked, "relevant_docs": qrels, "top_ranked": top}}}


def _splits(parts: dict[str, dict[str, Any]]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in parts.items()})
