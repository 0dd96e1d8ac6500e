"""Folders and files as tasks: a BEIR folder is a retrieval task; a test file's columns decide its kind.

A local task never uses the network. Its revision is a hash of its rows, so results of changed data are not mixed.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anchorembed.data.beir import Collection, beir_folders_in, read_collection
from anchorembed.data.documents import Document
from anchorembed.data.evaluation_files import (
    Candidates,
    LabelledText,
    SentencePair,
    TestSet,
    find_test_sets,
    read_test_set,
    stem,
)
from anchorembed.data.formats import TABLES, suffix_of
from anchorembed.data.store import open_corpus
from anchorembed.errors import InputError
from anchorembed.evaluate.quick import QUICK_DOCUMENTS, quick_items, subset
from anchorembed.evaluate.task_types import (
    MAIN_METRICS,
    Embed,
    Items,
    TaskMetrics,
    classification,
    pair_classification,
    reranking,
    retrieval,
    similarity,
)
from anchorembed.evaluate.tasks import TaskEmbedder, TaskScore
from anchorembed.system.files import hash_texts, to_json, write_file

_log = logging.getLogger(__name__)
Scores = dict[str, list[dict[str, Any]]]  # split -> metrics of its subsets, as in mteb's files


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task on local data; ``revision`` is a hash of the data, ``measure`` a function of `task_types` with its data.

    ``collection`` is the collection of a retrieval task.
    """

    name: str
    kind: str
    revision: str
    measure: Callable[[Embed], TaskMetrics]
    collection: Collection | None = None

    def run(self, embedder: TaskEmbedder, out: Path | None) -> TaskScore:
        """Evaluate, or read the result of the same data and model from the folder ``out``."""
        main, metric = MAIN_METRICS[self.kind]
        scores, items = self._read_result(embedder.result_file(out, self.name)) if out else None, Items()
        if scores is None:
            started = time.perf_counter()
            measured = self.measure(partial(embedder.embed, self.name, self.kind))
            items = measured.items
            values = measured.values | {"main_score": measured.values[main]}
            scores = {"test": [values | {"hf_subset": "default", "languages": ["und-Zyyy"]}]}
            if out:
                seconds = time.perf_counter() - started
                self._write_result(embedder.result_file(out, self.name), scores, seconds)
                embedder.describe(out)
        value = scores["test"][0]["main_score"]
        value = math.nan if value is None else float(value)
        return TaskScore(self.name, self.kind, metric, value, items, scores, embedder.form)

    def _read_result(self, path: Path) -> Scores | None:
        """The scores in a result file; None if it is missing, damaged or of other data."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            result = json.loads(path.read_text(encoding="utf-8"))
            scores: Scores = result["scores"]
            is_score = isinstance(scores["test"][0]["main_score"], float | None)  # None is an undefined score
            if is_score and result["dataset_revision"] == self.revision:
                return scores
        return None

    def _write_result(self, path: Path, scores: Mapping[str, Any], seconds: float) -> None:
        result = {
            "dataset_revision": self.revision,
            "task_name": self.name,
            "mteb_version": None,
            "scores": scores,
            "evaluation_time": seconds,
            "kg_co2_emissions": None,
            "date": time.time(),
        }
        write_file(path, to_json(result, indent=2))


def local_tasks(path: Path, split: str, quick: bool) -> list[LocalTask]:
    """The tasks of a BEIR folder, a test file or a folder of test files; the arguments are as in `find.find_tasks`.

    Raises:
        InputError: if a file or folder cannot be evaluated.
    """
    tasks = [_local_task(file, split, quick) for file in _files_to_evaluate(path)]
    return [replace(task, name=f"{task.name}-quick") for task in tasks] if quick else tasks


def _files_to_evaluate(path: Path) -> list[Path]:
    """The path itself, or a folder's files but those to train on; of files ``NAME_*`` only ``NAME_test``, if any."""
    files = find_test_sets(path)
    if files == [path]:
        return files
    stems = {stem(file) for file in files}
    tests, left_out = list[Path](), list[Path]()
    for file in files:
        name, _, part = stem(file).rpartition("_")
        if part == "test" or f"{name}_test" not in stems:
            (left_out if part == "train" else tests).append(file)
    if not tests:
        fault = f"no test is in it, as *_train is to train on ({_names(left_out)})"
        raise InputError(f"{path}: {fault}. Add a test, named *_test. {beir_folders_in(path)}".rstrip())
    if left_out:
        _log.warning("%s: not evaluated, by their names: %s. Rename what is a test.", path, _names(left_out))
    return tests


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files)


def _local_task(path: Path, split: str, quick: bool) -> LocalTask:
    if path.is_dir():
        collection = read_collection(path, split, open_corpus)
        revision = hash_texts(_collection_text(collection))
        if split != "test":
            collection = replace(collection, name=f"{collection.name}-{split}")
        evaluated = subset(collection, QUICK_DOCUMENTS) if quick else collection
        return LocalTask(collection.name, "Retrieval", revision, partial(retrieval, evaluated), evaluated)
    test = read_test_set(path)
    rows: Sequence[Any] = [test.rows[index] for index in quick_items(len(test.rows))] if quick else test.rows
    if test.kind == "Reranking":
        return _file_task(test, partial(reranking, _as_collection(test.name, rows)))
    if test.kind == "Classification":
        return _classification_task(path, test, rows)
    _check_values(test, rows)
    return _file_task(test, partial(similarity if test.kind == "STS" else pair_classification, rows))


def _check_values(test: TestSet, rows: Sequence[SentencePair]) -> None:
    """Refuse pairs of sentences for which the metric is undefined or always the same."""
    if test.kind == "STS" and len(rows) < 2:
        raise InputError(f"{test.name}: 1 pair of sentences, which has no rank correlation. Give at least two.")
    if len({row.value for row in rows}) == 1:
        cure = "Give scores that differ." if test.kind == "STS" else "Give pairs of label 0 and of label 1."
        name = "score" if test.kind == "STS" else "label"
        raise InputError(f"{test.name}: every {name} is {rows[0].value:g}, so nothing can be measured. {cure}")


def _classification_task(path: Path, test: TestSet, rows: Sequence[LabelledText]) -> LocalTask:
    train = _training_texts(path)
    labels = {row.label for row in train}
    if len(labels) < 2:
        raise InputError(
            f"{test.name}: all training texts have the label {next(iter(labels))!r}. Give at least two labels."
        )
    if unknown := sorted({row.label for row in rows} - labels):
        raise InputError(f"{test.name}: label {unknown[0]!r} is in no training text. Correct it, or add such texts.")
    return _file_task(test, partial(classification, train, rows), train)


def _training_texts(path: Path) -> list[LabelledText]:
    same_format = path.with_name(path.name.replace("_test.", "_train."))
    files = [file for file in sorted(path.parent.iterdir()) if suffix_of(file) in TABLES]
    beside = [file for file in files if stem(file) == stem(same_format)]
    if same_format == path or not beside:
        raise InputError(f"{path}: a classification needs its training texts beside it. Name them *_test, *_train.")
    train_path = same_format if same_format in beside else beside[0]
    training = read_test_set(train_path)
    if training.kind != "Classification":
        raise InputError(f"{train_path}: it has columns of {training.kind}. Give text and label, as in {path.name}.")
    return [row for row in training.rows if isinstance(row, LabelledText)]


def _file_task(test: TestSet, measure: Callable[[Embed], TaskMetrics], train: Sequence[LabelledText] = ()) -> LocalTask:
    revision = hash_texts(["\n".join(map(repr, [*train, *test.rows]))])
    return LocalTask(test.name, test.kind, revision, measure)


def _as_collection(name: str, rows: Sequence[Candidates]) -> Collection:
    """Each query with its candidates; a document's id is a hash of its text, so ids favour neither side in a tie."""
    ids = {text: hash_texts([text])[:16] for row in rows for text in (*row.positives, *row.negatives)}
    return Collection(
        name,
        tuple(Document(document_id, text) for text, document_id in ids.items()),
        tuple(Document(row.id, row.query) for row in rows),
        {row.id: {ids[text]: 0 for text in row.negatives} | {ids[text]: 1 for text in row.positives} for row in rows},
    )


def _collection_text(collection: Collection) -> Iterator[str]:
    """Three lines: the ``repr`` of the documents as a tuple, which is never made, of the queries and of the qrels."""
    yield "("
    for number, document in enumerate(collection.documents):
        yield f"{', ' if number else ''}{document!r}"
    yield f"{',' if len(collection.documents) == 1 else ''})\n{collection.queries!r}\n{collection.qrels!r}"
