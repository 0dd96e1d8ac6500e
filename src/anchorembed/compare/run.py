"""Run a comparison: arms x seeds x collections; each finished cell is written at once and never computed twice.

For each run: choose Stage II's settings (`choose`), train (`training`), evaluate, write the results (`results`), and
delete the model.
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
    """Make all missing runs, but start none after ``hours``; returns how many are still missing.

    Raises:
        InputError: if another process works in the results folder, or a training fails.
        Interrupted: if a signal stopped a training.
    """
    started = time.monotonic()
    results = comparison.results
    with lock_folder(results.folder):
        results.read()  # another process may have added some
        write_comparison(results.folder, comparison.record)
        missing = comparison.missing()
        for number, missing_run in enumerate(missing):
            if hours is not None and time.monotonic() - started > hours * 3600:
                return len(missing) - number
            title = comparison.arms[missing_run.arm].title
            shown = f"{title}, seed {missing_run.seed}, {missing_run.setting} settings"
            time_left = hours_left(comparison)
            _log.info("%s: run %d of %d%s", shown, number + 1, len(missing), f"; {time_left}" if time_left else "")
            _run(comparison, missing_run)
            _delete_models(comparison, missing_run)
    return 0


def _run(comparison: Comparison, run: Run) -> None:
    """Train a run's missing stages, then evaluate it; if its common settings are its arm's own, copy the results."""
    if not comparison.arms[run.arm].trained:
        _measure(comparison, run, "", {"base": comparison.recipe.model.name}, {})
        return
    choice, own_run = choose(comparison, run), replace(run, setting=OWN)
    if run.setting == COMMON and choice == choose(comparison, own_run):
        _copy(comparison, own_run, run)
        return
    before = train_before(comparison, run)
    after = train_stage_two(comparison, run, before, choice)
    stages = {"before": before, "contrast": after} if before else {"contrast": after}
    models = {"before": "before Stage II", "contrast": "after Stage II"}
    _measure(
        comparison,
        run,
        choice,
        {models[name]: str(folder / "model") for name, folder in stages.items()},
        {name: read_log(folder / "log.jsonl") for name, folder in stages.items()},
    )
    shutil.rmtree(after / "model")


def _copy(comparison: Comparison, source: Run, target: Run) -> None:
    """Copy the results of a run to another that has the same model; costs stay with the first."""
    results = comparison.results
    missing = {task.name for task in comparison.tasks_left(target)}
    cells = [cell for cell in results.cells_of(source) if cell.collection in missing]
    results.write_record(target, replace(results.record(source), costs={}))
    results.append(*(replace(cell, setting=target.setting) for cell in cells))


def _delete_models(comparison: Comparison, finished: Run) -> None:
    """Delete all models of an arm and a seed once none of their runs is missing.

    The model before Stage II is kept until then, because the run with common settings starts from it, too.
    """
    if all((run.arm, run.seed) != (finished.arm, finished.seed) for run in comparison.missing()):
        for model in run_folder(comparison, finished).glob("*/*/model"):
            shutil.rmtree(model)


# --- Measuring -------------------------------------------------------------------------------------------------------


def _measure(
    comparison: Comparison, run: Run, choice: str, models: dict[str, str], logs: dict[str, list[Metrics]]
) -> None:
    """Evaluate the last of a run's ``models``; results of each collection are written at once."""
    results = comparison.results
    recipe = comparison.recipe.model_copy(update={"seed": run.seed})
    device, last_model = recipe.model.device, list(models.values())[-1]
    prepared = prepare(recipe, last_model)
    earlier_record, dtype = results.record(run), str(prepared.embedder.dtype).removeprefix("torch.")
    costs = {stage: Cost.of(log) for stage, log in logs.items()}
    evaluate_cost = earlier_record.costs.get("evaluate", Cost(0.0))
    record = RunRecord(
        costs=costs,
        curves={
            stage: [{key: value for key, value in line.items() if key not in _NOT_IN_CURVES} for line in log]
            for stage, log in logs.items()
        },
        isotropy={
            name: _isotropy(
                prepared, prepared.embedder if model == last_model else load_embedder(recipe, model, device)
            )
            for name, model in models.items()
            if len(prepared.split.held_out) > 1
        },
        made_with=versions() | {"threads": str(torch.get_num_threads()), "matrix products": dtype},
        items=earlier_record.items,
    )
    _log.info("evaluating")
    for task, score, seconds in _evaluate(comparison, run, prepared.embedder):
        evaluate_cost = Cost(evaluate_cost.seconds + seconds)
        record = replace(
            record,
            costs=costs | {"evaluate": evaluate_cost},
            items=record.items | {task.name: ItemScores.of(task.revision, score.items)},
        )
        results.write_record(run, record)
        results.append(
            Cell(
                **asdict(run),
                choice=choice,
                collection=task.name,
                revision=task.revision,
                metric=score.metric,
                value=score.value,
            )
        )


def _evaluate(comparison: Comparison, run: Run, embedder: Embedder) -> Iterator[tuple[Task, TaskScore, float]]:
    """A run's score on each missing collection, with the seconds that its evaluation took."""
    with tempfile.TemporaryDirectory() as folder:
        cache = VectorCache(embedder, Path(folder))
        task_embedder = TaskEmbedder(cache, run.name, comparison.settings.instructions)
        for task in comparison.tasks_left(run):
            started = time.perf_counter()
            (score,) = run_tasks(task_embedder, [task])
            if math.isnan(score.value):
                raise InputError(
                    f"{task.name}: {score.metric} of {run.name} is undefined, so arms cannot be compared by it. "
                    "Leave the task out of compare.collections."
                )
            yield task, score, time.perf_counter() - started


def _isotropy(prepared: Prepared, embedder: Embedder) -> Isotropy:
    """Isotropy of a model's vectors of held-out pairs."""
    pairs = prepared.tokens(prepared.split.held_out_sample(_ISOTROPY_PAIRS).tolist())
    queries = embedder.encode_tokens([pair.query for pair in pairs])
    documents = embedder.encode_tokens([pair.document for pair in pairs])
    return isotropy(queries.numpy(), documents.numpy())
