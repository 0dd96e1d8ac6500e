"""How long a run may be on this machine: measure a step of each stage, then fit steps into a number of minutes.

The measured times differ from machine to machine and from run to run; the sizes are for whoever begins a run to keep.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from anchorembed.config import Recipe
from anchorembed.system.device import wait_for
from anchorembed.train.loop import make_optimizer
from anchorembed.train.prepare import Prepared, prepare
from anchorembed.train.run import STAGES, plan_memory
from anchorembed.train.stage import Stage, StageName, step

ENOUGH = 12  # steps of Stage II from which a run is expected to be clearly above chance
_LEAST = 4  # steps of a stage, whatever they take
_TRAINING = 0.85  # of the time left beside measuring; the rest is for saving, loading and the page
_FORWARD = 0.35  # of a step's time, to evaluate as many pairs
_CONTRAST = 0.6  # of the training time, for Stage II, which is run twice
_MEASURING = 0.4  # of the time left, at most, for the documents that models are measured on
_FEWEST_DOCUMENTS = 100
_LONG = 10.0  # seconds of a step from which it is timed once only


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: of a step of each stage, of all evaluations on held-out pairs, of embedding a text; spent already."""

    reconstruct: float
    contrast: float
    held_out: float
    text: float
    spent: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """What fits: steps of each stage, documents that models are measured on, and the minutes that all of it takes."""

    reconstruct_steps: int
    contrast_steps: int
    documents: int
    minutes: float

    @property
    def is_enough(self) -> bool:
        """Whether Stage II is expected to end clearly above chance."""
        return self.contrast_steps >= ENOUGH


def fitting_sizes(minutes: float, times: Times, most: tuple[int, int, int], embeddings: float) -> Sizes:
    """Steps and documents that fit into ``minutes``; both arms have the same Stage II.

    Args:
        minutes: all that is to be used, what is spent included.
        times: as measured here.
        most: steps of Stage I, steps of Stage II and documents that are of use.
        embeddings: how many texts are embedded for each document in all.
    """
    begun = times.spent + times.held_out
    left = max(0.0, 60 * minutes - begun)
    by_document = embeddings * times.text
    documents = max(_FEWEST_DOCUMENTS, min(most[2], int(_MEASURING * left / by_document)))
    training = _TRAINING * max(0.0, left - documents * by_document)
    contrast_steps = max(_LEAST, min(most[1], int(_CONTRAST * training / (2 * times.contrast))))
    left_over = training - 2 * contrast_steps * times.contrast
    reconstruct_steps = max(_LEAST, min(most[0], int(left_over / times.reconstruct)))
    spent = 2 * contrast_steps * times.contrast + reconstruct_steps * times.reconstruct
    seconds = begun + documents * by_document + spent / _TRAINING
    return Sizes(reconstruct_steps, contrast_steps, documents, seconds / 60)


def minutes_for(contrast_steps: int, times: Times, most: tuple[int, int, int], embeddings: float) -> int:
    """The fewest whole minutes into which so many steps of Stage II fit, of the most that are of use."""
    wanted = min(contrast_steps, most[1])
    minutes = 1
    while fitting_sizes(minutes, times, most, embeddings).contrast_steps < wanted:
        minutes += max(1, minutes // 20)
    return minutes


def resized(recipe: Recipe, sizes: Sizes) -> Recipe:
    """The recipe with other numbers of steps; what is counted in steps keeps its share of them."""
    changed = {}
    for name, steps in (("reconstruct", sizes.reconstruct_steps), ("contrast", sizes.contrast_steps)):
        settings = recipe.reconstruct if name == "reconstruct" else recipe.contrast
        if settings is not None:
            counted = {key: getattr(settings, key) for key in ("warmup_steps", "save_every", "evaluate_every")}
            new = {key: max(1, round(value * steps / settings.steps)) for key, value in counted.items() if value}
            changed[name] = settings.model_copy(update={"steps": steps, **new})
    return recipe.model_copy(update=changed)


def measure(recipe: Recipe, texts: Sequence[str], spent: Callable[[], float]) -> tuple[Times, int]:
    """Time a step of each stage and the embedding of some texts; returns that and the number of pairs to train on.

    Args:
        recipe: with both stages.
        texts: to embed.
        spent: the seconds spent so far, asked at the end.
    """
    prepared = prepare(recipe, recipe.model.name)
    embedder = prepared.embedder
    embedder.encode(texts[:2])
    started = time.perf_counter()
    embedder.encode(texts)
    text = (time.perf_counter() - started) / len(texts)
    seconds: dict[StageName, float] = {}
    for name, kind in STAGES.items():
        settings = recipe.stage(name)
        if settings is not None:
            budget = plan_memory(recipe, kind, settings, recipe.model.name).budget
            seconds[name] = _step_seconds(recipe, prepared, kind.build(embedder, settings, budget))
    held_out = _held_out_seconds(recipe, len(prepared.split.held_out), seconds)
    times = Times(seconds["reconstruct"], seconds["contrast"], held_out, text, spent())
    return times, len(prepared.split.train)


def _held_out_seconds(recipe: Recipe, pairs: int, step_seconds: Mapping[StageName, float]) -> float:
    """Seconds of all evaluations on held-out pairs, by the time of a step of each stage; Stage II is run twice."""
    total = 0.0
    for name, seconds in step_seconds.items():
        settings = recipe.stage(name)
        if settings is not None and settings.evaluate_every:
            evaluations = math.ceil(settings.steps / settings.evaluate_every) * (2 if name == "contrast" else 1)
            total += evaluations * pairs / settings.batch_size * _FORWARD * seconds
    return total


def _step_seconds(recipe: Recipe, prepared: Prepared, stage: Stage) -> float:
    """Seconds of a whole step, after a small one: the faster of two, unless one takes long."""
    optimizer = make_optimizer(stage.module, stage.settings)
    device = prepared.embedder.backbone.device
    stage.module.train()
    indices = next(prepared.order(stage.settings.batch_size, recipe.seed))
    seconds: list[float] = []
    for some in (indices[:2], indices, indices):
        started = time.perf_counter()
        step(stage, 0, prepared.tokens(some, stage.hard_negatives))
        nn.utils.clip_grad_norm_(stage.module.parameters(), stage.settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 1 and seconds[-1] > _LONG:
            break
    return min(seconds[1:])
