"""What fits into the minutes asked for, in pure numbers, and what the first arm's real times change."""

from pathlib import Path

import pytest

from anchorembed.recipe_file import parse_recipe
from anchorembed.train.time_budget import (
    ENOUGH,
    Sizes,
    StageTimes,
    Times,
    corrected,
    fitting_sizes,
    minutes_for,
    refitted,
    resized,
    seconds_left,
)
from tiny import recipe_values

MOST = Sizes(2000, 500, 500)
TWO_CORES = Times(StageTimes(3.0, 17.0, 5.0), StageTimes(5.0, 7.0, 5.0), document=0.15, ending=70.0)
SPEEDS = [0.001, 0.1, 0.5, 1.0, 2.0, 8.0]


def slower(times: Times, factor: float) -> Times:
    stages = (times.reconstruct.scaled(factor), times.contrast.scaled(factor))
    return Times(*stages, factor * times.document, factor * times.ending)


def is_least(sizes: Sizes) -> bool:
    return sizes.contrast_steps == 4 or sizes.reconstruct_steps == 4 or sizes.documents == 100


def test_nine_minutes_of_two_cores_by_hand() -> None:
    """540 s: 22 + 2 * 12 + 70 are fixed, 75 go to 500 documents; half of the other 349 to both Stages II."""
    assert seconds_left(Sizes(0, 0, 0), TWO_CORES) == 116
    assert fitting_sizes(540, TWO_CORES, MOST) == Sizes(59, 17, 500)  # 174.5 / (2 * 5); (349 - 170) / 3


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("minutes", [1, 5, 10, 60])
def test_what_fits_takes_no_longer_than_is_left(minutes: int, speed: float) -> None:
    """But for the fewest steps and documents, which are said to take longer; and no more is done than is of use."""
    times = slower(TWO_CORES, speed)
    fitted = fitting_sizes(60 * minutes, times, MOST)
    assert seconds_left(fitted, times) <= 60 * minutes + 1e-6 or is_least(fitted)
    assert fitted.contrast_steps in range(4, MOST.contrast_steps + 1)
    assert fitted.reconstruct_steps in range(4, MOST.reconstruct_steps + 1)
    assert fitted.documents in range(100, MOST.documents + 1)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_wrong_first_estimate_is_made_good(speed: float) -> None:
    """A run whose times are all another multiple of the estimate: it ends in time, with the same Stage II twice."""
    real = slower(TWO_CORES, speed)
    planned = fitting_sizes(600, TWO_CORES, MOST)
    spent = real.contrast.of(planned.contrast_steps)
    log = [{"step": float(n), "seconds": real.contrast.step} for n in range(planned.contrast_steps)]
    log[-1]["seconds"] += real.contrast.evaluations
    known = corrected(TWO_CORES, planned.contrast_steps, log)
    assert known.contrast.step == pytest.approx(real.contrast.step)
    assert known.ending == pytest.approx(real.ending)
    with_stage_one = refitted(600 - spent, known, planned, MOST, 1)
    spent += real.reconstruct.of(with_stage_one.reconstruct_steps) + real.contrast.of(with_stage_one.contrast_steps)
    last = refitted(600 - spent, known, with_stage_one, MOST, 2)
    assert planned.contrast_steps == with_stage_one.contrast_steps == last.contrast_steps
    assert last.reconstruct_steps == with_stage_one.reconstruct_steps
    assert spent + seconds_left(last, real, 2) <= 600 + 1e-6 or is_least(last)
    if speed in (0.5, 1.0):
        assert last.reconstruct_steps >= planned.reconstruct_steps
        assert spent + seconds_left(last, real, 2) > 500, "what is left is used"


def test_a_fast_machine_trains_an_epoch_and_ends_early() -> None:
    fast = slower(TWO_CORES, 0.01)
    assert fitting_sizes(600, fast, MOST) == MOST
    assert seconds_left(MOST, fast) < 300


def test_a_slow_machine_is_told_which_minutes_would_be_enough() -> None:
    slow = slower(TWO_CORES, 4.0)
    assert not fitting_sizes(450, slow, MOST).is_enough
    minutes = minutes_for(ENOUGH, 150, slow, MOST)
    assert minutes > 10
    assert fitting_sizes(60 * minutes - 150, slow, MOST).is_enough
    assert 150 + seconds_left(fitting_sizes(60 * minutes - 150, slow, MOST), slow) <= 60 * minutes
    assert not fitting_sizes(0.85 * 60 * minutes - 150, slow, MOST).is_enough
    assert minutes_for(9999, 150, slow, MOST) >= minutes_for(MOST.contrast_steps, 150, slow, MOST)


def test_what_is_counted_in_steps_keeps_its_share(tiny_folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 100, "epochs": 3, "batch_size": 8, "warmup_steps": 10, "save_every": 50, "evaluate_every": 25}
    values = recipe_values(tmp_path / "pairs.jsonl", tiny_folder, tmp_path / "run")
    recipe = parse_recipe(values | {"reconstruct": stage, "contrast": stage | {"evaluate_every": 0}})
    made = resized(recipe, Sizes(20, 200, 500))
    assert made.reconstruct is not None
    assert made.contrast is not None
    assert made.reconstruct.model_dump(include=set(stage)) == {
        "steps": 20,
        "epochs": None,
        "batch_size": 8,
        "warmup_steps": 2,
        "save_every": 10,
        "evaluate_every": 5,
    }
    assert (made.contrast.steps, made.contrast.evaluate_every, made.contrast.save_every) == (200, 0, 100)
    assert resized(recipe, Sizes(1, 1, 1)).reconstruct.warmup_steps == 1  # type: ignore[union-attr]
