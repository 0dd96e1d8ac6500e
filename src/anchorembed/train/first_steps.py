"""What a step of each stage takes on this machine, and the work around it: the times that a run is sized by."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from anchorembed.config import Recipe, Schedule
from anchorembed.model.adapters import merge_lora
from anchorembed.train.loop import make_optimizer, whole_step
from anchorembed.train.prepare import Prepared, load_embedder, prepare
from anchorembed.train.run import STAGES, plan_memory
from anchorembed.train.sizing import StageTimes, Times
from anchorembed.train.stage import Stage, StageName

_FORWARD = 0.45  # of a step's time, to evaluate as many pairs
_PROBES = 2  # steps that are timed
_LONG = 10.0  # seconds of a step from which no other is timed
Result = TypeVar("Result")


def measure(recipe: Recipe, texts: Sequence[str], document_texts: int, loads: int) -> tuple[Times, int]:
    """Time steps of each stage, a load of the model and the embedding of some texts.

    For each document ``document_texts`` texts are embedded in all. After the last stage a model is loaded ``loads``
    times, or what takes as long is done.

    Returns:
        The times, and the number of pairs to train on.
    """
    prepared = prepare(recipe, recipe.model.name)  # with what is done only once, such as fetching the model
    loading, embedder = _timed(partial(load_embedder, recipe, recipe.model.name, recipe.model.device))
    embedder.encode(texts[:2])
    text = _timed(partial(embedder.encode, texts))[0] / len(texts)
    stages: dict[StageName, StageTimes] = {}
    for name, kind in STAGES.items():
        settings = recipe.stage(name)
        if settings is not None:
            budget = plan_memory(recipe, kind, settings, recipe.model.name).budget
            seconds = _step_seconds(recipe, prepared, kind.build(prepared.embedder, settings, budget))
            merge_lora(prepared.embedder.backbone)
            prepared.embedder.requires_grad_(requires_grad=True)
            evaluations = _evaluations(settings, len(prepared.split.held_out)) * seconds
            stages[name] = StageTimes(seconds, evaluations, 2 * loading)  # saving takes as long
    times = Times(stages["reconstruct"], stages["contrast"], document_texts * text, loads * loading)
    return times, len(prepared.split.train)


def _timed(do: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = do()
    return time.perf_counter() - started, result


def _evaluations(settings: Schedule, pairs: int) -> float:
    """How many steps take as long as all evaluations of a stage on so many held-out pairs."""
    if not settings.evaluate_every:
        return 0.0
    return math.ceil(settings.steps / settings.evaluate_every) * pairs / settings.batch_size * _FORWARD


def _step_seconds(recipe: Recipe, prepared: Prepared, stage: Stage) -> float:
    """Mean seconds of whole steps of different pairs, after a small one; of one step where that takes long."""
    optimizer = make_optimizer(stage.module, stage.settings)
    stage.module.train()

    def run(indices: Sequence[int]) -> None:
        whole_step(stage, optimizer, 0, prepared.tokens(indices, stage.hard_negatives))

    seconds: list[float] = []
    for indices in islice(prepared.order(stage.settings.batch_size, recipe.seed), _PROBES):
        if not seconds:
            run(indices[:2])  # the first step of all takes longer
        seconds.append(_timed(partial(run, indices))[0])
        if seconds[-1] > _LONG:
            break
    return sum(seconds) / len(seconds)
