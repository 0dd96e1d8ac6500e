"""Tasks by name: local folders and files first, then mteb's tasks and benchmarks."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from anchorembed.errors import InputError, extra
from anchorembed.evaluate.local import LocalTask, local_tasks
from anchorembed.evaluate.ranking import Scorer
from anchorembed.evaluate.task_types import Items, search_by_scores
from anchorembed.evaluate.tasks import Task, TaskEmbedder, TaskScore, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.search.vector_cache import VectorCache

_log = logging.getLogger(__name__)


def find_tasks(names: Sequence[str], split: str = "test", quick: bool = False) -> list[Task]:
    """Return the tasks of these names, in order.

    Args:
        names: BEIR folders, test files, folders of test files, or names of mteb's tasks and benchmarks. In a folder
            of files each is a task but those named ``*_train``, which have a classification's training texts, and
            other parts of a test: of files ``NAME_*`` only ``NAME_test``, if there is one.
        split: which qrels of a BEIR folder; a warning names the other tasks, to which it does not apply.
        quick: a fixed part of each: at most 1,000 documents, or 500 test items; the task's name then ends in -quick.

    Raises:
        InputError: if a name is unknown, two tasks share a name, or mteb is needed and not installed.
    """
    tasks = [task for name in names for task in _find(name, split, quick)]
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"{task.name}: two tasks have this name. Rename one, or evaluate them separately.")
        seen.add(task.name)
    whole = [task.name for task in tasks if not (isinstance(task, LocalTask) and task.collection)]
    if whole and split != "test":
        _log.warning("split %s: only BEIR folders have splits. Evaluated as without it: %s.", split, ", ".join(whole))
    return tasks


def _find(name: str, split: str, quick: bool) -> Sequence[Task]:
    path = Path(name).expanduser()
    if path.exists():
        return local_tasks(path, split, quick)
    try:
        with extra("mteb"):
            from anchorembed.evaluate import mteb  # noqa: PLC0415 - an extra, which takes seconds to import
    except InputError as error:
        raise InputError(f"{name}: neither a folder nor a file here, and tasks by name are mteb's. {error}") from error
    return mteb.tasks_by_name(name, quick)


def measure_on(names: Sequence[str]) -> Callable[[Embedder], dict[str, float]]:
    """Return a function that gives each task's main metric for an embedder's present weights, while it trains."""
    tasks = find_tasks(names)

    def measure(embedder: Embedder) -> dict[str, float]:
        # A new object, because an embedder computes its fingerprint only once, and the weights have changed since.
        current = Embedder(embedder.backbone, embedder.tokenizer, embedder.metadata, embedder.dtype)
        return {f"{score.task} {score.metric}": score.value for score in score_on(tasks, current)}

    return measure


def score_on(tasks: Sequence[Task], embedder: Embedder) -> list[TaskScore]:
    """Each task's score, without files of results or vectors."""
    with tempfile.TemporaryDirectory() as folder:
        return list(run_tasks(TaskEmbedder(VectorCache(embedder, Path(folder)), "training", {}), tasks))


def score_by_words(tasks: Sequence[Task], by_words: Callable[[Sequence[str]], Scorer]) -> dict[str, Items]:
    """nDCG@10 of each query, by task, ranked by a ``Scorer`` such as BM25; for local retrieval tasks only."""
    searched = {task.name: task.collection for task in tasks if isinstance(task, LocalTask) and task.collection}
    return {name: search_by_scores(collection, by_words) for name, collection in searched.items()}
