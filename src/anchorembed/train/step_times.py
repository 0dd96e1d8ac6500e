"""Measure how long a step of each stage, and the work around it, takes here, to size a run (`time_budget`)."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from anchorembed.model.adapters import merge_lora
from anchorembed.recipe_schema import Recipe
from anchorembed.train.loop import whole_step
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.prepare import Prepared, load_embedder, prepare
from anchorembed.train.run import STAGES, plan_memory
from anchorembed.train.stage import Stage, StageName
from anchorembed.train.time_budget import StageTimes, Times

_FORWARD = 0.45  # share of a step's time that an evaluation of as many pairs takes
_TIMED_STEPS = 2
_LONG = 10.0  # seconds of a step after which no other is timed
Result = TypeVar("Result")


def measure(recipe: Recipe, texts: Sequence[str], document_texts: int, loads: int) -> tuple[Times, int]:
    """Time steps of each stage, a load of the model and the embedding of some texts.

    Args:
        recipe: has both stages.
        texts: texts to embed.
        document_texts: texts that the run embeds for each document measured on.
        loads: loads of a model after the last stage, or work that takes as long.

    Returns:
        The times, and the number of pairs to train on.
    """
    prepared = prepare(recipe, recipe.model.name)  # not timed: it also does what is done only once, such as downloads
    loading, embedder = _timed(partial(load_embedder, recipe, recipe.model.name, recipe.model.device))
    embedder.encode(texts[:2])
    text = _timed(partial(embedder.encode, texts))[0] / len(texts)
    stages: dict[StageName, StageTimes] = {}
    for name, stage_class in STAGES.items():
        settings = recipe.stage(name)
        if settings is not None:
            budget = plan_memory(recipe, stage_class, settings, recipe.model.name).budget
            seconds = _step_seconds(recipe, prepared, stage_class.build(prepared.embedder, settings, budget))
            merge_lora(prepared.embedder.backbone)
            prepared.embedder.requires_grad_(requires_grad=True)
            every, held_out = settings.evaluate_every, len(prepared.split.held_out)
            evaluations = math.ceil(settings.steps / every) * held_out / settings.batch_size if every else 0.0
            stages[name] = StageTimes(seconds, evaluations * _FORWARD * seconds, 2 * loading)  # saving takes as long
    times = Times(stages["reconstruct"], stages["contrast"], document_texts * text, loads * loading)
    return times, len(prepared.split.train)


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _step_seconds(recipe: Recipe, prepared: Prepared, stage: Stage) -> float:
    """Mean seconds of two whole steps, after a small one that is not timed; of one step if it takes long."""
    optimizer = make_optimizer(stage.module, stage.settings)
    stage.module.train()

    def run(indices: Sequence[int]) -> None:
        whole_step(stage, optimizer, 0, prepared.tokens(indices, stage.hard_negatives))

    seconds: list[float] = []
    for indices in islice(prepared.order(stage.settings.batch_size, recipe.seed), _TIMED_STEPS):
        if not seconds:
            run(indices[:2])  # the first step takes longer
        seconds.append(_timed(partial(run, indices))[0])
        if seconds[-1] > _LONG:
            break
    return sum(seconds) / len(seconds)
