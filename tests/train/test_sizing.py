"""Steps fit into the minutes asked for, in pure numbers; what is measured is a step of each stage."""

from dataclasses import replace
from pathlib import Path

import pytest

from anchorembed.recipe import parse_recipe
from anchorembed.train.sizing import ENOUGH, Sizes, Times, fitting_sizes, measure, minutes_for, resized
from tiny import recipe_values, write_pairs

MOST = (2000, 500, 500)
TWO_CORES = Times(reconstruct=5.0, contrast=5.0, held_out=20.0, text=0.04, spent=25.0)


def sizes(minutes: float, times: Times = TWO_CORES) -> Sizes:
    return fitting_sizes(minutes, times, MOST, 7)


def test_ten_minutes_of_two_cores_by_hand() -> None:
    """555 s are left: 140 s for 500 documents; 0.85 of 415 s train: 352.75, 0.6 of it for both Stages II."""
    fitted = sizes(10)
    assert (fitted.documents, fitted.contrast_steps) == (500, 21)  # 211.65 / 10
    assert fitted.reconstruct_steps == 28  # (352.75 - 210) / 5
    assert fitted.minutes == pytest.approx((25 + 20 + 140 + 350 / 0.85) / 60)
    assert fitted.is_enough


@pytest.mark.parametrize("slowness", [0.001, 0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("minutes", [1, 5, 10, 60])
def test_what_fits_takes_no_longer_than_asked(minutes: int, slowness: float) -> None:
    """But for the fewest steps and documents, which are said to take longer."""
    times = Times(*(slowness * value for value in (5.0, 5.0, 4.0, 0.04)), 45.0)
    fitted = sizes(minutes, times)
    least = (fitted.contrast_steps, fitted.documents) == (4, 100) or fitted.reconstruct_steps == 4
    assert fitted.minutes <= minutes + 1e-9 or least
    assert fitted.contrast_steps in range(4, MOST[1] + 1)
    assert fitted.reconstruct_steps in range(4, MOST[0] + 1)
    assert fitted.documents in range(100, MOST[2] + 1)


def test_a_fast_machine_trains_an_epoch_and_ends_early() -> None:
    fitted = sizes(10, Times(0.05, 0.05, 0.5, 0.0002, 60.0))
    assert (fitted.reconstruct_steps, fitted.contrast_steps, fitted.documents) == MOST
    assert fitted.minutes < 6


def test_a_slow_machine_is_told_which_minutes_would_be_enough() -> None:
    slow = replace(TWO_CORES, reconstruct=20.0, contrast=20.0, text=0.2, spent=150.0)
    assert not sizes(10, slow).is_enough
    minutes = minutes_for(ENOUGH, slow, MOST, 7)
    assert sizes(minutes, slow).is_enough
    assert minutes > 10
    assert not sizes(0.9 * minutes, slow).is_enough
    assert minutes_for(9999, slow, MOST, 7) >= minutes_for(MOST[1], slow, MOST, 7)


def test_what_is_counted_in_steps_keeps_its_share(tiny_folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 100, "batch_size": 8, "warmup_steps": 10, "save_every": 50, "evaluate_every": 25}
    values = recipe_values(tmp_path / "pairs.jsonl", tiny_folder, tmp_path / "run")
    recipe = parse_recipe(values | {"reconstruct": stage, "contrast": stage | {"evaluate_every": 0}})
    made = resized(recipe, Sizes(20, 200, 500, 10.0))
    assert made.reconstruct is not None
    assert made.contrast is not None
    assert made.reconstruct.model_dump(include=set(stage)) == {
        "steps": 20,
        "batch_size": 8,
        "warmup_steps": 2,
        "save_every": 10,
        "evaluate_every": 5,
    }
    assert (made.contrast.steps, made.contrast.evaluate_every, made.contrast.save_every) == (200, 0, 100)
    assert resized(recipe, Sizes(1, 1, 1, 1.0)).reconstruct.warmup_steps == 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_step_of_each_stage_is_measured_and_nothing_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 100, "batch_size": 8, "warmup_steps": 1}
    values = recipe_values(write_pairs(tmp_path / "pairs.jsonl", 60), tiny_folder, tmp_path / "run")
    times, pairs = measure(
        parse_recipe(values | {"reconstruct": stage, "contrast": stage}), ["a", "b"] * 8, lambda: 7.0
    )
    assert min(times.reconstruct, times.contrast, times.text) > 0
    assert times.spent == 7
    assert times.held_out == pytest.approx(0.35 * 6 / 8 * (times.reconstruct + 2 * times.contrast))
    assert pairs == len((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) - 6
    assert not (tmp_path / "run").exists()
