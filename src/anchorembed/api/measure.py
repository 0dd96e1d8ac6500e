"""Measure models: `evaluate`, `isotropy`, and the `page` of a run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError, extra
from anchorembed.evaluate.isotropy import Isotropy
from anchorembed.evaluate.isotropy import isotropy as measure_isotropy
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import vector_formats
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.files import cache_folder, check_writable
from anchorembed.system.progress import counting_bar

if TYPE_CHECKING:  # it needs an extra, which only `evaluate` imports
    from anchorembed.evaluate.tasks import TaskScore


def evaluate(  # noqa: PLR0913 - the options of a verb
    model: str | Path,
    tasks: Sequence[str | Path],
    *,
    split: str = "test",
    instructions: Mapping[str, str] | None = None,
    quick: bool = False,
    out: str | Path | None = None,
    dimensions: Sequence[int] = (),
    precision: Sequence[str] = (),
    on_score: "Callable[[TaskScore], None]" = lambda _: None,
) -> "list[TaskScore]":
    """Score a model on local test folders and files and on mteb's tasks and benchmarks by name.

    Args:
        model: model folder, hub id, ``.gguf`` file or ``smollm2-135m``.
        tasks: as in `find.find_tasks`.
        split: which qrels of a BEIR folder.
        instructions: by task name, task type or ``default``; they replace the model's own. They are put before queries
            and the texts of symmetric tasks, never before documents.
        quick: a fixed part of each task only; the task's name then ends in ``-quick``.
        out: folder for result files in mteb's form; results that are already there are read.
        dimensions: also score vectors cut to these dimensions; texts are embedded once.
        precision: also score vectors stored in these formats; full float32 vectors always come first.
        on_score: called with each task's score as soon as it is known.

    Raises:
        InputError: if a task is unknown or cannot be evaluated, or the extra ``eval`` is not installed.
    """
    with extra("eval"):
        from anchorembed.evaluate.find import find_tasks
        from anchorembed.evaluate.tasks import TaskEmbedder, check_instructions, run_tasks
    chosen = find_tasks([str(task) for task in tasks], split, quick)
    check_instructions(instructions or {}, chosen)
    embedder = Embedder.load(model)
    vectors = VectorCache(embedder, cache_folder() / "vectors")
    name = "-".join(Path(model).parts[-3:]) if Path(model).exists() else str(model)
    task_embedder = TaskEmbedder(vectors, name, instructions or {})
    scores: list[TaskScore] = []
    for task, form in product(chosen, vector_formats(embedder.dimension, dimensions, precision)):
        (score,) = run_tasks(replace(task_embedder, smaller=form), [task], Path(out) if out else None)
        on_score(score)
        scores.append(score)
    return scores


def isotropy(models: Sequence[str | Path], pairs: str | Path, *, most: int = 1000) -> dict[str, Isotropy]:
    """Isotropy of each model's vectors, by model, measured on the first ``most`` pairs of a file.

    Raises:
        InputError: if there are fewer than two pairs.
    """
    chosen = list(islice(read_pairs(pairs), min(most, sys.maxsize)))
    if len(chosen) < 2:
        raise InputError(f"{pairs}: one pair, which has no other to compare with. Give at least two.")
    by_model: dict[str, Isotropy] = {}
    for model in models:
        embedder = Embedder.load(model)
        with counting_bar(f"embedding for {model}", 2 * len(chosen)) as advance:
            queries = embedder.encode([pair.query for pair in chosen], "query", progress=advance)
            documents = embedder.encode([pair.positive for pair in chosen], progress=advance)
        by_model[str(model)] = measure_isotropy(queries, documents)
    return by_model


def page(run: str | Path, *, pairs: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Write a run's page, one HTML file with scores, curves, searches, maps and what a vector says; returns its path.

    Args:
        run: recipe or output folder, as in `page.run_contents.page_of_run`.
        pairs: file of pairs that were not trained on; by default those that the recipe holds out.
        out: file to write; by default ``page.html`` in the output folder.

    Raises:
        InputError: as `page_of_run` does, and where the packages of the extra ``compare`` are not installed.
    """
    if out is not None:
        check_writable(Path(out), run, pairs)
    with extra("compare"):
        from anchorembed.page.html import write_page
        from anchorembed.page.run_contents import page_of_run
    shown, output = page_of_run(Path(run), Path(pairs) if pairs else None)
    return write_page(shown, Path(out) if out else output / "page.html")
