"""Run a comparison: arms x seeds x collections; each finished cell is written at once and never computed twice.

A run chooses Stage II's settings (`choose`), trains (`training`), measures the model, writes its results (`results`)
and deletes the model.
"""

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from anchorembed.compare.choose import choose
from anchorembed.compare.plan import Comparison, hours_left
from anchorembed.compare.records import COMMON, OWN, Cell, Cost, ItemScores, Run, RunRecord
from anchorembed.compare.results import write_comparison
from anchorembed.compare.training import run_folder, train_before, train_stage_two
from anchorembed.errors import InputError
from anchorembed.evaluate.isotropy import Isotropy, isotropy
from anchorembed.evaluate.tasks import Task, TaskEmbedder, TaskScore, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.device import versions
from anchorembed.system.files import lock_folder
from anchorembed.train.loop import read_log
from anchorembed.train.prepare import Prepared, load_embedder, prepare
from anchorembed.train.stage import Metrics

_log = logging.getLogger(__name__)

_ISOTROPY_PAIRS = 512
_NOT_IN_CURVES = {"seconds", "tokens", "flops", "peak_gb", "learning_rate", "gradient_norm", "teaches_nothing"}


def run(comparison: Comparison, hours: float | None = None) -> int:
    """Run all missing runs, or start none after some hours; returns how many runs are still missing.

    Raises:
        InputError: if another process is at work in the results folder, or a training fails.
        Interrupted: if a signal stopped a training.
    """
    started = time.monotonic()
    with lock_folder(comparison.results.folder):
        comparison.results.read()  # another process may have added some
        write_comparison(comparison.results.folder, comparison.record)
        missing = comparison.missing()
        for number, wanted in enumerate(missing):
            if hours is not None and time.monotonic() - started > hours * 3600:
                return len(missing) - number
            which = f"{comparison.arms[wanted.arm].title}, seed {wanted.seed}, {wanted.setting} settings"
            left = hours_left(comparison)
            _log.info("%s: run %d of %d%s", which, number + 1, len(missing), f"; {left}" if left else "")
            _run(comparison, wanted)
            _delete_models(comparison, wanted)
    return 0


def _run(comparison: Comparison, wanted: Run) -> None:
    """Train a run's missing stages, then evaluate it; if common settings equal own ones, copy the results."""
    if not comparison.arms[wanted.arm].trained:
        _measure(comparison, wanted, "", {"base": comparison.recipe.model.name}, {})
        return
    choice, own = choose(comparison, wanted), replace(wanted, setting=OWN)
    if wanted.setting == COMMON and choice == choose(comparison, own):
        _copy(comparison, own, wanted)
        return
    before = train_before(comparison, wanted)
    after = train_stage_two(comparison, wanted, before, choice)
    stages = {"before": before, "contrast": after} if before else {"contrast": after}
    models = {"before": "before Stage II", "contrast": "after Stage II"}
    _measure(
        comparison,
        wanted,
        choice,
        {models[name]: str(folder / "model") for name, folder in stages.items()},
        {name: read_log(folder / "log.jsonl") for name, folder in stages.items()},
    )
    shutil.rmtree(after / "model")


def _copy(comparison: Comparison, source: Run, target: Run) -> None:
    """Copy the results of a run to another with the same model, without costs."""
    results = comparison.results
    missing = {task.name for task in comparison.tasks_left(target)}
    cells = [cell for cell in results.cells_of(source) if cell.collection in missing]
    results.keep_record(target, replace(results.record(source), costs={}))
    results.keep(*(replace(cell, setting=target.setting) for cell in cells))


def _delete_models(comparison: Comparison, done: Run) -> None:
    """Delete all models of an arm and a seed once none of their runs is missing; their recipes can train them again.

    The model before Stage II is kept until then, because the run with common settings starts from it, too.
    """
    if all((run.arm, run.seed) != (done.arm, done.seed) for run in comparison.missing()):
        for model in run_folder(comparison, done).glob("*/*/model"):
            shutil.rmtree(model)


# --- Measuring -------------------------------------------------------------------------------------------------------


def _measure(
    comparison: Comparison, wanted: Run, choice: str, models: dict[str, str], logs: dict[str, list[Metrics]]
) -> None:
    """Evaluate the last of a run's ``models``; results of each collection are written at once."""
    results = comparison.results
    recipe = comparison.recipe.model_copy(update={"seed": wanted.seed})
    prepared = prepare(recipe, list(models.values())[-1])
    earlier, dtype = results.record(wanted), str(prepared.embedder.dtype).removeprefix("torch.")
    costs = {name: Cost.of(log) for name, log in logs.items()}
    seconds = earlier.costs["evaluate"].seconds if "evaluate" in earlier.costs else 0.0
    record = RunRecord(
        costs=costs,
        curves={
            name: [{key: value for key, value in line.items() if key not in _NOT_IN_CURVES} for line in log]
            for name, log in logs.items()
        },
        isotropy={
            name: _isotropy(prepared, load_embedder(recipe, model, recipe.model.device))
            for name, model in models.items()
            if len(prepared.split.held_out) > 1
        },
        made_with=versions() | {"threads": str(torch.get_num_threads()), "matrix products": dtype},
        items=earlier.items,
    )
    _log.info("evaluating")
    for task, score, spent in _evaluate(comparison, wanted, prepared.embedder):
        seconds += spent
        record = replace(
            record,
            costs=costs | {"evaluate": Cost(seconds)},
            items=record.items | {task.name: ItemScores(task.revision, score.items)},
        )
        results.keep_record(wanted, record)
        results.keep(
            Cell(
                **asdict(wanted),
                choice=choice,
                collection=task.name,
                revision=task.revision,
                metric=score.metric,
                value=score.value,
            )
        )


def _evaluate(comparison: Comparison, wanted: Run, embedder: Embedder) -> Iterator[tuple[Task, TaskScore, float]]:
    """A run's score on each missing collection, with the seconds of its evaluation."""
    with tempfile.TemporaryDirectory() as vectors:
        cache = VectorCache(embedder, Path(vectors))
        task_embedder = TaskEmbedder(cache, wanted.name, comparison.settings.instructions)
        for task in comparison.tasks_left(wanted):
            began = time.perf_counter()
            (score,) = run_tasks(task_embedder, [task])
            if math.isnan(score.value):
                raise InputError(
                    f"{task.name}: {score.metric} of {wanted.name} is undefined, so arms cannot be compared by it. "
                    "Leave the task out of compare.collections."
                )
            yield task, score, time.perf_counter() - began


def _isotropy(prepared: Prepared, embedder: Embedder) -> Isotropy:
    """Isotropy of a model's vectors of held-out pairs."""
    pairs = prepared.tokens(prepared.split.held_out[:_ISOTROPY_PAIRS].tolist())
    queries = embedder.encode_tokens([pair.query for pair in pairs])
    documents = embedder.encode_tokens([pair.document for pair in pairs])
    return isotropy(queries.numpy(), documents.numpy())
