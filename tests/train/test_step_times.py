"""What a step of each stage takes is measured on the recipe's own pairs, and nothing is written."""

from pathlib import Path

import pytest

from anchorembed.recipe_file import parse_recipe
from anchorembed.train.step_times import measure
from tiny import recipe_values, write_pairs


@pytest.mark.slow
def test_a_step_of_each_stage_is_measured_and_nothing_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 100, "batch_size": 8, "warmup_steps": 1}
    path = write_pairs(tmp_path / "pairs.jsonl", 60)
    values = recipe_values(path, tiny_folder, tmp_path / "run")
    evaluated = stage | {"evaluate_every": 40}
    adapted = evaluated | {"lora": {"targets": ["q_proj"]}}  # gone before Stage II is timed
    recipe = parse_recipe(values | {"reconstruct": adapted, "contrast": stage | {"evaluate_every": 0, "lora": None}})
    times, pairs = measure(recipe, ["a", "b"] * 8, 7, 10)
    assert min(times.reconstruct.step, times.contrast.step, times.document) > 0
    assert times.reconstruct.evaluations == pytest.approx(3 * 6 / 8 * 0.45 * times.reconstruct.step)
    assert times.contrast.evaluations == 0
    assert times.ending == pytest.approx(5 * times.contrast.loading)
    assert pairs == len(path.read_text(encoding="utf-8").splitlines()) - 6
    assert not (tmp_path / "run").exists()
