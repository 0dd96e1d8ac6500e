"""What a model is evaluated on: local folders and files, scored here, and mteb's tasks and benchmarks by name.

A local task never asks the network, and its revision is a hash of its rows, so results of changed data never mix.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from anchorembed.data.beir import Collection, read_collection
from anchorembed.data.documents import Document
from anchorembed.data.judged import (
    QUICK_DOCUMENTS,
    Candidates,
    LabelledText,
    TestSet,
    quick_items,
    read_test_set,
    stem,
    test_files,
)
from anchorembed.data.store import open_corpus
from anchorembed.errors import InputError, extra
from anchorembed.evaluate.metrics import (
    Embed,
    Measured,
    classification,
    pair_classification,
    reranking,
    retrieval,
    similarity,
)
from anchorembed.evaluate.ranking import subset
from anchorembed.evaluate.tasks import Adapter, LocalTask, Task, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.files import cache_folder


def find_tasks(names: Sequence[str], split: str = "test", quick: bool = False) -> list[Task]:
    """Return the tasks that ``names`` mean, in order.

    Args:
        names: BEIR folders, test files, folders of test files, or names of mteb's tasks and benchmarks. In a folder
            of files those named ``*_test`` count if there are any; a classification's training texts are in the file
            named ``*_train`` beside it.
        split: which qrels of a BEIR folder.
        quick: a fixed part of each: at most 1,000 documents, or 500 test items; the name says so.

    Raises:
        InputError: if a name means nothing, two tasks share a name, or mteb is needed and not installed.
    """
    tasks = [task for name in names for task in _find(name, split, quick)]
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"{task.name}: two tasks have this name. Rename one, or evaluate it apart.")
        seen.add(task.name)
    return tasks


def measure_on(names: Sequence[str]) -> Callable[[Embedder], dict[str, float]]:
    """A function of an embedder as it is now that gives each task's main score; for use while it trains."""
    tasks = find_tasks(names)

    def measure(embedder: Embedder) -> dict[str, float]:
        now = Embedder(
            embedder.backbone, embedder.tokenizer, embedder.metadata
        )  # whose fingerprint is of these weights
        now.dtype = embedder.dtype
        with tempfile.TemporaryDirectory() as folder:
            scores = run_tasks(Adapter(now, "training", VectorCache(now, Path(folder)), {}), tasks)
            return {f"{score.task} {score.metric}": score.value for score in scores}

    return measure


def _find(name: str, split: str, quick: bool) -> Sequence[Task]:
    path = Path(name).expanduser()
    if path.exists():
        return [_local(place, split, quick) for place in _places(path)]
    try:
        with extra("mteb"):
            from anchorembed.evaluate import mteb  # noqa: PLC0415 - an extra, which takes seconds to import
    except InputError as error:
        raise InputError(f"{name}: neither a folder nor a file here, and tasks by name are mteb's. {error}") from error
    return mteb.find(name, quick)


def _places(path: Path) -> list[Path]:
    """A BEIR folder or a file alone; of a folder of test files those to evaluate."""
    files = test_files(path)
    if files == [path]:
        return files
    tests = [file for file in files if stem(file).endswith("_test")]
    return tests or [file for file in files if not stem(file).endswith("_train")]


def _local(path: Path, split: str, quick: bool) -> LocalTask:
    if path.is_dir():
        collection = read_collection(path, split, lambda corpus: open_corpus(corpus, cache_folder() / "corpora"))
        name = collection.name if split == "test" else f"{collection.name}-{split}"
        return retrieval_task(replace(collection, name=name), quick)
    test = read_test_set(path)
    rows: Sequence[Any] = [test.rows[index] for index in quick_items(len(test.rows))] if quick else test.rows
    if test.kind == "Reranking":
        return _task(test, partial(reranking, _candidates(test.name, rows)), quick)
    if test.kind == "Classification":
        return _classification_task(path, test, rows, quick)
    if test.kind == "STS" and len(rows) < 2:
        raise InputError(f"{test.name}: 1 pair of sentences, whose rank correlates with nothing. Give at least two.")
    return _task(test, partial(similarity if test.kind == "STS" else pair_classification, rows), quick)


def retrieval_task(collection: Collection, quick: bool = False) -> LocalTask:
    """A collection as a task, scored by nDCG@10."""
    revision = _revision(_content(collection))
    chosen = subset(collection, QUICK_DOCUMENTS) if quick else collection
    return LocalTask(_name(collection.name, quick), "Retrieval", revision, partial(retrieval, chosen))


def _task(
    test: TestSet, measure: Callable[[Embed], Measured], quick: bool, train: Sequence[LabelledText] = ()
) -> LocalTask:
    return LocalTask(_name(test.name, quick), test.kind, _revision(_lines([*train, *test.rows])), measure)


def _name(name: str, quick: bool) -> str:
    return f"{name}-quick" if quick else name


def _revision(content: Iterable[str]) -> str:
    """Hash of a task's content, given in parts."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _lines(rows: Iterable[object]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield ("\n" if number else "") + repr(row)


def _content(collection: Collection) -> Iterator[str]:
    """A collection as its documents' tuple, queries and qrels would be shown, a line each, without making the tuple."""
    yield "("
    for number, document in enumerate(collection.documents):
        yield f"{', ' if number else ''}{document!r}"
    yield f"{',' if len(collection.documents) == 1 else ''})\n{collection.queries!r}\n{collection.qrels!r}"


def _candidates(name: str, rows: Sequence[Candidates]) -> Collection:
    """Each query with its own candidates; a document's id is a hash of its text, so ids favour no side."""
    ids = {text: _text_id(text) for row in rows for text in (*row.positives, *row.negatives)}
    return Collection(
        name,
        tuple(Document(name, text) for text, name in ids.items()),
        tuple(Document(row.id, row.query) for row in rows),
        {row.id: {ids[text]: 0 for text in row.negatives} | {ids[text]: 1 for text in row.positives} for row in rows},
    )


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _classification_task(path: Path, test: TestSet, rows: Sequence[LabelledText], quick: bool) -> LocalTask:
    train = _training_texts(path)
    labels = {row.label for row in train}
    if len(labels) < 2:
        raise InputError(
            f"{test.name}: all training texts have the label {next(iter(labels))!r}. Give at least two labels."
        )
    if unknown := sorted({row.label for row in rows} - labels):
        raise InputError(f"{test.name}: label {unknown[0]!r} is in no training text. Correct it, or add such texts.")
    return _task(test, partial(classification, train, rows), quick, train)


def _training_texts(path: Path) -> list[LabelledText]:
    beside = path.with_name(path.name.replace("_test.", "_train."))
    if beside == path or not beside.is_file():
        raise InputError(f"{path}: a classification needs its training texts beside it. Name them *_test, *_train.")
    return [row for row in read_test_set(beside).rows if isinstance(row, LabelledText)]
