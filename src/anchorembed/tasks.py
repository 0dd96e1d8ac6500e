"""What a model is evaluated on: mteb's tasks and benchmarks by name, and local folders and files made into such tasks.

A local task never asks the network. Its dataset revision is a hash of its rows, so results of changed data never mix.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from anchorembed.errors import InputError, nearest
from anchorembed.evaluation import subset
from anchorembed.records import Collection, Document, read_collection
from anchorembed.runtime import cache_folder
from anchorembed.store import open_corpus
from anchorembed.testsets import Candidates, LabelledText, SentencePair, TestSet, read_test_set, stem, test_files

_QUICK_DOCUMENTS, _QUICK_ITEMS = 1000, 500
_AT_ONCE = 100  # read from disk at once
_MAIN_SCORE = {
    "Retrieval": "ndcg_at_10",
    "Reranking": "map_at_1000",
    "STS": "cosine_spearman",
    "PairClassification": "max_ap",
    "Classification": "accuracy",
}


@dataclass(frozen=True, slots=True)
class StoredDocuments:
    """The documents of a dataset with columns ``id`` and ``text``, maybe ``title``; read as they are gone through."""

    data: Dataset

    def __len__(self) -> int:
        return len(self.data)

    @property
    def ids(self) -> list[str]:
        """All ids, without reading texts."""
        return [str(name) for name in self.data["id"]]

    def __iter__(self) -> Iterator[Document]:
        for rows in self.data.iter(_AT_ONCE):
            titles = rows.get("title") or [""] * len(rows["id"])
            for name, title, text in zip(rows["id"], titles, rows["text"], strict=True):
                yield Document(str(name), f"{title} {text}" if title else text)  # as mteb joins them


def find_tasks(names: Sequence[str], split: str = "test", quick: bool = False) -> list[AbsTask]:
    """Return the tasks that ``names`` mean, in order.

    Args:
        names: BEIR folders, test files, folders of test files, or names of mteb's tasks and benchmarks. In a folder
            of files those named ``*_test`` count if there are any; a classification's training texts are in the file
            named ``*_train`` beside it.
        split: which qrels of a BEIR folder.
        quick: a fixed part of each: at most 1,000 documents, or 500 test items; the name says so.

    Raises:
        InputError: if a name means nothing, or two tasks share a name.
    """
    tasks = [task for name in names for task in _find(name, split, quick)]
    seen: set[str] = set()
    for task in tasks:
        if task.metadata.name in seen:
            raise InputError(f"{task.metadata.name}: two tasks have this name. Rename one, or evaluate it apart.")
        seen.add(task.metadata.name)
    return tasks


def load(task: AbsTask) -> None:
    """Fetch one of mteb's tasks from the hub or its cache.

    Raises:
        InputError: if its data cannot be had.
    """
    try:
        task.load_data()
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:  # RuntimeError: data that a script makes
        raise InputError(
            f"{task.metadata.name}: its data cannot be had from the hub ({' '.join(str(error).split())}). Check the "
            "network and your access to it, or name a local folder."
        ) from error


def _find(name: str, split: str, quick: bool) -> list[AbsTask]:
    path = Path(name).expanduser()
    if path.exists():
        return [_local(place, split, quick) for place in _places(path)]
    try:
        found = [mteb.get_task(name)]
    except KeyError:
        found = _benchmark(name)
    for task in found:
        if others := sorted(set(task.metadata.modalities) - {"text"}):
            raise InputError(
                f"{task.metadata.name}: it holds {', '.join(others)}; only texts can be embedded. Leave it out."
            )
    return [_quick_task(task) for task in found] if quick else found


def _benchmark(name: str) -> list[AbsTask]:
    known = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    if name in known:
        return list(known[name].tasks)
    every = [*known, *(task.metadata.name for task in mteb.get_tasks())]
    raise InputError(
        f"{name}: neither a folder or file here nor a task or benchmark of mteb.{nearest(name, every)} Check the name."
    )


# --- Local folders and files -----------------------------------------------------------------------------------------


def _places(path: Path) -> list[Path]:
    """A BEIR folder or a file alone; of a folder of test files those to evaluate."""
    files = test_files(path)
    if files == [path]:
        return files
    tests = [file for file in files if stem(file).endswith("_test")]
    return tests or [file for file in files if not stem(file).endswith("_train")]


def _local(path: Path, split: str, quick: bool) -> AbsTask:
    if path.is_dir():
        collection = read_collection(path, split, _on_disk)
        name = collection.name if split == "test" else f"{collection.name}-{split}"
        return retrieval_task(replace(collection, name=name), quick)
    test = read_test_set(path)
    if test.kind == "Reranking":
        return _rerank_task(test, quick)
    if test.kind == "Classification":
        return _classification_task(test, _training_texts(path), quick)
    return _sentence_task(test, quick)


def _on_disk(corpus: Path) -> StoredDocuments:
    return StoredDocuments(Dataset.from_file(str(open_corpus(corpus, cache_folder() / "corpora"))))


def _metadata(name: str, kind: str, content: Iterable[str], quick: bool) -> TaskMetadata:
    """Metadata with the hash of a task's content, given in parts, as its revision."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.encode(errors="surrogatepass"))
    return TaskMetadata(
        name=f"{name}-quick" if quick else name,
        description=f"local data{', a fixed part of it' if quick else ''}",
        type=kind,
        dataset={"path": f"local/{name}", "revision": digest.hexdigest()},
        eval_splits=["test"],
        eval_langs=["und-Zyyy"],
        main_score=_MAIN_SCORE[kind],
    )


def _lines(rows: Iterable[object]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield ("\n" if number else "") + repr(row)


def _content(collection: Collection) -> Iterator[str]:
    """A collection as its documents' tuple, queries and qrels would be shown, a line each, without making the tuple."""
    yield "("
    for number, document in enumerate(collection.documents):
        yield f"{', ' if number else ''}{document!r}"
    yield f"{',' if len(collection.documents) == 1 else ''})\n{collection.queries!r}\n{collection.qrels!r}"


class _Retrieval(AbsTaskRetrieval):
    """A retrieval or reranking task whose data are there already."""

    def __init__(self, metadata: TaskMetadata, data: RetrievalSplitData) -> None:
        self.metadata = metadata
        super().__init__()
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


def retrieval_task(collection: Collection, quick: bool = False) -> AbsTask:
    """A collection as a task, scored by nDCG@10."""
    metadata = _metadata(collection.name, "Retrieval", _content(collection), quick)
    chosen = subset(collection, _QUICK_DOCUMENTS) if quick else collection
    return _Retrieval(metadata, _split_data(chosen))


def _split_data(collection: Collection) -> RetrievalSplitData:
    return RetrievalSplitData(
        corpus=_dataset(collection.documents),
        queries=_dataset(collection.queries),
        relevant_docs={query: dict(grades) for query, grades in collection.qrels.items()},
        top_ranked=None,
    )


def _dataset(documents: Iterable[Document]) -> Dataset:
    if isinstance(documents, StoredDocuments):
        return documents.data
    kept = list(documents)
    return Dataset.from_dict({"id": [one.id for one in kept], "text": [one.text for one in kept]})


def _rerank_task(test: TestSet, quick: bool) -> AbsTask:
    """Each query's own candidates, scored by MAP; a document's id is a hash of its text, so ids favour no side."""
    rows = [row for row in _part(test.rows, quick) if isinstance(row, Candidates)]
    ids = {text: _text_id(text) for row in rows for text in (*row.positives, *row.negatives)}
    data = RetrievalSplitData(
        corpus=_dataset(Document(name, text) for text, name in ids.items()),
        queries=_dataset(Document(row.id, row.query) for row in rows),
        relevant_docs={
            row.id: {ids[text]: 0 for text in row.negatives} | {ids[text]: 1 for text in row.positives} for row in rows
        },
        top_ranked={row.id: sorted({ids[text] for text in (*row.positives, *row.negatives)}) for row in rows},
    )
    return _Retrieval(_metadata(test.name, "Reranking", _lines(test.rows), quick), data)


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Sts(AbsTaskSTS):
    """Similarity of sentences whose data are there already."""

    def __init__(self, metadata: TaskMetadata, test: Dataset) -> None:
        self.metadata = metadata
        super().__init__()
        self.dataset = DatasetDict({"test": test})
        self.data_loaded = True


class _PairClassification(AbsTaskPairClassification):
    """Pairs to classify whose data are there already."""

    def __init__(self, metadata: TaskMetadata, test: Dataset) -> None:
        self.metadata = metadata
        super().__init__()
        self.dataset = DatasetDict({"test": test})
        self.data_loaded = True


def _sentence_task(test: TestSet, quick: bool) -> AbsTask:
    rows = [row for row in _part(test.rows, quick) if isinstance(row, SentencePair)]
    if test.kind == "STS" and len(rows) < 2:
        raise InputError(f"{test.name}: 1 pair of sentences, whose rank correlates with nothing. Give at least two.")
    metadata = _metadata(test.name, test.kind, _lines(test.rows), quick)
    columns: dict[str, list[Any]] = {
        "sentence1": [row.first for row in rows],
        "sentence2": [row.second for row in rows],
    }
    if test.kind == "STS":
        return _Sts(metadata, Dataset.from_dict(columns | {"score": [row.value for row in rows]}))
    return _PairClassification(metadata, Dataset.from_dict(columns | {"labels": [int(row.value) for row in rows]}))


class _Classification(AbsTaskClassification):
    """Classification by mteb's protocol: a logistic regression on 8 texts a label, drawn 10 times."""

    samples_per_label = 8
    n_experiments = 10

    def __init__(self, metadata: TaskMetadata, train: Dataset, test: Dataset) -> None:
        self.metadata = metadata
        super().__init__()
        self.dataset = DatasetDict({"train": train, "test": test})
        self.data_loaded = True


def _training_texts(path: Path) -> TestSet:
    beside = path.with_name(path.name.replace("_test.", "_train."))
    if beside == path or not beside.is_file():
        raise InputError(f"{path}: a classification needs its training texts beside it. Name them *_test, *_train.")
    return read_test_set(beside)


def _classification_task(test: TestSet, train: TestSet, quick: bool) -> AbsTask:
    rows = [row for row in _part(test.rows, quick) if isinstance(row, LabelledText)]
    learn = [row for row in train.rows if isinstance(row, LabelledText)]
    labels = {label: number for number, label in enumerate(sorted({row.label for row in learn}))}
    unknown = sorted({row.label for row in rows} - set(labels))
    if len(labels) < 2:
        raise InputError(
            f"{test.name}: all training texts have the label {next(iter(labels))!r}. Give at least two labels."
        )
    if unknown:
        raise InputError(f"{test.name}: label {unknown[0]!r} is in no training text. Correct it, or add such texts.")
    train_set, test_set = (
        Dataset.from_dict({"text": [row.text for row in part], "label": [labels[row.label] for row in part]})
        for part in (learn, rows)
    )
    metadata = _metadata(test.name, "Classification", _lines([*train.rows, *test.rows]), quick)
    return _Classification(metadata, train_set, test_set)


# --- A part of a task ------------------------------------------------------------------------------------------------


def _part(rows: Sequence[Any], quick: bool) -> list[Any]:
    """All rows, or a fixed choice of some."""
    return [rows[index] for index in _chosen(len(rows))] if quick else list(rows)


def _chosen(count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(count), min(count, _QUICK_ITEMS)))  # noqa: S311 - a fixed choice


def _quick_task(task: AbsTask) -> AbsTask:
    """Load one of mteb's tasks and keep a fixed part of each split that is evaluated."""
    load(task)
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(None)
        for splits in task.dataset.values():
            for name, data in splits.items():
                if data["top_ranked"] is None:
                    splits[name] = _split_data(subset(_collection(task.metadata.name, data), _QUICK_DOCUMENTS))
                else:
                    data["queries"] = data["queries"].select(_chosen(len(data["queries"])))
                    kept = set(data["queries"]["id"])
                    grades = {query: found for query, found in data["relevant_docs"].items() if query in kept}
                    data["relevant_docs"] = grades
    else:
        _shorten(task.dataset, set(task.eval_splits))
    task.metadata = task.metadata.model_copy(update={"name": f"{task.metadata.name}-quick"})
    return task


def _collection(name: str, data: RetrievalSplitData) -> Collection:
    qrels = {query: dict(grades) for query, grades in data["relevant_docs"].items()}
    return Collection(name, StoredDocuments(data["corpus"]), tuple(StoredDocuments(data["queries"])), qrels)


def _shorten(data: Any, splits: set[str]) -> None:  # noqa: ANN401 - mteb nests data sets as each task likes
    for name, value in data.items():
        if isinstance(value, Dataset):
            if name in splits:
                data[name] = value.select(_chosen(len(value)))
        else:
            _shorten(value, splits)
