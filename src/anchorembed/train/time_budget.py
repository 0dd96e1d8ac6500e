"""How many steps and documents of a run fit into the seconds that are left, by measured times.

The run has two arms: Stage II alone, then Stage I followed by the same Stage II. The duration of each arm corrects all
times. After the first arm, the steps of Stage I are fitted into the time that is left; after the second, the documents
to measure on. So errors do not add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.train.stage import Metrics, StageName

ENOUGH = 12  # steps of Stage II from which a run is expected to be clearly above chance
_LEAST = 4  # steps of a stage, whatever they take
_FEWEST_DOCUMENTS = 100
_CONTRAST = 0.5  # of the training time, for Stage II of both arms; Stage I gets what is left
_MEASURING = 0.3  # of the time left, at most, for the documents to measure on


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of a step, of all evaluations on held-out pairs, and of loading and saving the model."""

    step: float
    evaluations: float
    loading: float

    def of(self, steps: int) -> float:
        """Seconds of the stage with ``steps`` steps."""
        return steps * self.step + self.evaluations + self.loading

    def scaled(self, factor: float) -> "StageTimes":
        """All times multiplied by ``factor``."""
        return StageTimes(factor * self.step, factor * self.evaluations, factor * self.loading)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each stage, of the work for each document measured on, and of the work after that."""

    reconstruct: StageTimes
    contrast: StageTimes
    document: float
    ending: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Steps of each stage, and documents to measure on."""

    reconstruct_steps: int
    contrast_steps: int
    documents: int

    @property
    def is_enough(self) -> bool:
        """Whether Stage II is expected to end clearly above chance."""
        return self.contrast_steps >= ENOUGH


def seconds_left(sizes: Sizes, times: Times, arms: int = 0) -> float:
    """Seconds that a run takes after ``arms`` of its two arms."""
    stage_one = times.reconstruct.of(sizes.reconstruct_steps) if arms < 2 else 0.0
    stage_two = (2 - arms) * times.contrast.of(sizes.contrast_steps)
    return stage_one + stage_two + sizes.documents * times.document + times.ending


def fitting_sizes(left: float, times: Times, most: Sizes) -> Sizes:
    """Steps and documents of a whole run that fit into ``left`` seconds; none above those of ``most``."""
    free = left - seconds_left(Sizes(0, 0, 0), times)
    documents = _fitted(_MEASURING * free, times.document, _FEWEST_DOCUMENTS, most.documents)
    training = free - documents * times.document
    contrast_steps = _fitted(_CONTRAST * training, 2 * times.contrast.step, _LEAST, most.contrast_steps)
    return _with_stage_one(left, times, Sizes(0, contrast_steps, documents), most, 0)


def refitted(left: float, times: Times, sizes: Sizes, most: Sizes, arms: int) -> Sizes:
    """Fit Stage I, after the first arm, or the documents, after the second, into ``left`` seconds.

    Stage II does not change: it is the same in both arms.
    """
    if arms == 1:
        return _with_stage_one(left, times, sizes, most, arms)
    rest = left - times.ending
    return replace(sizes, documents=_fitted(rest, times.document, _FEWEST_DOCUMENTS, most.documents))


def _with_stage_one(left: float, times: Times, sizes: Sizes, most: Sizes, arms: int) -> Sizes:
    """The sizes with as many steps of Stage I as there is time for."""
    rest = left - seconds_left(replace(sizes, reconstruct_steps=0), times, arms)
    return replace(sizes, reconstruct_steps=_fitted(rest, times.reconstruct.step, _LEAST, most.reconstruct_steps))


def _fitted(seconds: float, each: float, least: int, most: int) -> int:
    return max(least, min(most, int(seconds / each)))


def corrected(times: Times, contrast_steps: int, log: Sequence[Metrics]) -> Times:
    """The times, scaled by how long Stage II's steps and evaluations took according to its log."""
    factor = sum(entry["seconds"] for entry in log) / (
        contrast_steps * times.contrast.step + times.contrast.evaluations
    )
    reconstruct, contrast = times.reconstruct.scaled(factor), times.contrast.scaled(factor)
    return Times(reconstruct, contrast, factor * times.document, factor * times.ending)


def minutes_for(contrast_steps: int, spent: float, times: Times, most: Sizes) -> int:
    """The fewest minutes, within 5 %, of a run with ``contrast_steps`` steps of Stage II, at most those of ``most``.

    They include ``spent`` seconds.
    """
    wanted, minutes = min(contrast_steps, most.contrast_steps), 1
    while True:
        left = 60 * minutes - spent
        sizes = fitting_sizes(left, times, most)
        if sizes.contrast_steps >= wanted and seconds_left(sizes, times) <= left:
            return minutes
        minutes += max(1, minutes // 20)


def resized(recipe: Recipe, sizes: Sizes) -> Recipe:
    """The recipe with other numbers of steps; settings that count steps are scaled with them."""
    changed: dict[str, Schedule] = {}
    steps_of: dict[StageName, int] = {"reconstruct": sizes.reconstruct_steps, "contrast": sizes.contrast_steps}
    for name, steps in steps_of.items():
        if (settings := recipe.stage(name)) is not None:
            counted = {key: getattr(settings, key) for key in ("warmup_steps", "save_every", "evaluate_every")}
            new = {key: max(1, round(value * steps / settings.steps)) for key, value in counted.items() if value}
            changed[name] = settings.model_copy(update={"steps": steps, "epochs": None, **new})
    return recipe.model_copy(update=changed)
