"""Stage II's settings are chosen once all of the grid is tried, with the first seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorembed.compare import choose
from anchorembed.compare.plan import open_comparison
from anchorembed.compare.records import OWN, Cost, GridScore, accuracy_by_choice
from anchorembed.compare.report import write_report
from anchorembed.compare.results import write_comparison
from anchorembed.recipe_schema import Recipe

Make = Callable[..., Recipe]


def test_nothing_is_chosen_until_all_of_the_grid_is_tried(make: Make, tmp_path: Path) -> None:
    """Of equals the first of the grid is chosen, as it is where it is trained."""
    comparison = open_comparison(make(grid=[{"scale": 7}, {"scale": 9}]), tmp_path)
    write_comparison(tmp_path, comparison.record)
    both = comparison.arm_record("both")
    nine, seven = (f"learning_rate=0.001-warmup_steps=2-scale={scale}" for scale in (9, 7))
    for name, chosen in ((nine, False), (seven, True)):
        comparison.results.append(GridScore("both", both.digest, 0, name, 0.5, Cost(1.0)))
        write_report(tmp_path)
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert f"{name}: 0.500".replace("_", "\\_") in text
        assert (f"chosen for Stage II: {seven};".replace("_", "\\_") in text) == chosen


def test_trials_with_another_seed_do_not_count(make: Make, tmp_path: Path) -> None:
    recipe = make(grid=[{"scale": 7}, {"scale": 9}])
    comparison = open_comparison(recipe, tmp_path)
    both = comparison.arm_record("both")
    for choice in comparison.record.choices:
        comparison.results.append(GridScore("both", both.digest, 1, choice, 0.5, Cost(1.0)))
    assert len(comparison.results.grid) == 2
    assert accuracy_by_choice(comparison.results.grid, both) == {}


@pytest.mark.parametrize(("qualities", "accuracy"), [((0.9, 0.7), 0.25), ((None, None), 0.5)])
def test_a_trial_counts_by_the_step_whose_model_is_kept(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qualities: tuple[float | None, ...],
    accuracy: float,
) -> None:
    """The best one with ``keep_best``, or the last one if no quality is defined."""
    own_arms = {"best": {"like": "contrast", "contrast": {"keep_best": True}}}
    recipe = make(arms=["both", "best"], declared=[], own_arms=own_arms, grid=[{"scale": 7}, {"scale": 9}])
    comparison = open_comparison(recipe, tmp_path)
    cost = {"seconds": 1.0, "tokens": 1, "flops": 1.0, "peak_gb": 1.0}
    log = [
        cost | {"step": step, "held_out_accuracy": step / 4} | ({} if quality is None else {"quality": quality})
        for step, quality in enumerate(qualities, 1)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
    monkeypatch.setattr(choose, "train_stage_two", lambda *_: tmp_path)
    trial = choose._trial(comparison, comparison.arm_record("best").run(OWN, 0), "scale=7")
    assert trial.accuracy == accuracy
