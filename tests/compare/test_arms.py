"""Arms get equal compute and the same pairs, and each has the recipe that its settings ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorembed.compare import arms as arms_module
from anchorembed.compare.arms import (
    READY_ARMS,
    before_recipe,
    choices,
    contrast_recipe,
    find_arms,
    matched_steps,
    stage_flops,
)
from anchorembed.errors import InputError
from anchorembed.recipe_schema import Recipe
from anchorembed.train.prepare import Prepared, prepare

Make = Callable[..., Recipe]


def test_every_arm_gets_the_compute_of_the_primary_arm(make: Make, tmp_path: Path) -> None:
    recipe = make(arms=list(READY_ARMS), declared=["contrast"])
    arms = find_arms(recipe.compare)
    steps = matched_steps(recipe, arms)
    assert steps["base"] == steps["contrast"] == 0
    assert steps["both"] == 6

    def step_flops(derived: Recipe) -> float:
        return stage_flops(derived, prepare(derived, derived.model.name))

    budget = step_flops(before_recipe(recipe, READY_ARMS["both"], 0, 6, tmp_path)) * 6
    for arm in arms:
        arm_recipe = before_recipe(recipe, arm, 0, steps[arm.name], tmp_path)
        if arm.longer:
            arm_recipe = contrast_recipe(recipe, arm, 0, {}, None, 0, tmp_path)
            assert contrast_recipe(recipe, arm, 0, {}, None, 9, tmp_path).contrast.steps == 13
        if arm_recipe is None:
            continue
        flops = step_flops(arm_recipe)
        assert abs(flops * steps[arm.name] - budget) <= flops, arm.name
        assert arm_recipe.compare is None
        assert arm_recipe.data == recipe.data
    assert steps["q2d"] + steps["d2q"] > 2 * steps["both"]


def test_a_budget_is_a_share_of_the_primary_arm_s_compute(make: Make) -> None:
    recipe = make(
        arms=["both", "both_half", "alike", "longer", "longer_2"],
        own_arms={
            "both_half": {"like": "both", "budget": 0.5},
            "alike": {"like": "both_half"},
            "longer": {"like": "contrast_longer"},
            "longer_2": {"like": "contrast_longer", "budget": 2},
        },
        declared=["longer"],
    )
    arms = find_arms(recipe.compare)
    steps = matched_steps(recipe, arms)
    assert steps["both_half"] == steps["alike"] == 3
    assert abs(steps["longer_2"] - 2 * steps["longer"]) <= 1
    digests = {arm.name: arm.digest for arm in arms}
    assert digests["longer"] == READY_ARMS["contrast_longer"].digest  # 1 changes no key of earlier results
    assert digests["longer_2"] != digests["longer"]


def test_compute_is_counted_on_the_pairs_of_the_first_seed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever seed the recipe has for training it alone."""
    prepare, seeds = arms_module.prepare, []

    def spy(recipe: Recipe, *rest: Any) -> Prepared:
        seeds.append(recipe.seed)
        return prepare(recipe, *rest)

    monkeypatch.setattr(arms_module, "prepare", spy)
    recipe = make(seeds=[3, 4])
    matched_steps(recipe.model_copy(update={"seed": 9}), find_arms(recipe.compare))
    assert seeds == [3]


def test_recipes_of_an_arm_have_its_settings(make: Make, tmp_path: Path) -> None:
    recipe = make(
        arms=["both", "mine"], own_arms={"mine": {"like": "q2d", "before": {"learning_rate": 0.5}, "what": "Mine."}}
    )
    both, mine = find_arms(recipe.compare)
    paper = before_recipe(recipe, both, 3, 6, tmp_path)
    assert paper.reconstruct.model_dump() == recipe.reconstruct.model_dump() | {"decode": True}
    derived = before_recipe(recipe, mine, 3, 7, tmp_path)
    assert (derived.seed, derived.reconstruct.steps, derived.reconstruct.directions) == (3, 7, "q2d")
    assert derived.reconstruct.learning_rate == 0.5
    full = before_recipe(recipe, READY_ARMS["full_contrast"], 0, 9, tmp_path)
    assert full.reconstruct is None
    assert (full.contrast.lora, full.contrast.learning_rate, full.contrast.steps) == (None, 1e-3, 9)
    second = contrast_recipe(recipe, both, 0, {"scale": 7.0}, "there", 5, tmp_path)
    assert (second.contrast.from_, second.contrast.scale, second.contrast.steps) == ("there", 7.0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["both", "contrats"]}, "no arm is called 'contrats'. Did you mean 'contrast'"),
        ({"arms": ["contrast"]}, "'both' is not among compare.arms"),
        ({"own_arms": {"both": {"like": "q2d"}}}, "'both' is a ready arm"),
        (
            {"own_arms": {"x": {"like": "q2d", "title": "Both + contrastive"}}, "arms": ["both", "x"], "declared": []},
            "both and x have the same title, 'Both . contrastive'",
        ),
        ({"declared": ["both"]}, "'both' is compare.primary"),
        ({"explore": {"contrast": ["basis"]}}, "compare.explore: no arm is called 'basis'. Did you mean 'base'"),
        ({"explore": {"both": ["contrast"]}}, "compare.explore: 'both' is compare.primary, tested against all others"),
        ({"explore": {"contrast": ["contrast"]}}, "compare.explore: 'contrast' is in its own list"),
        (
            {"own_arms": {"x": {"like": "base", "contrast": {"scale": 9}}}},
            "x.contrast.scale: no arm may set it, as base",
        ),
        ({"declared": ["nothing"]}, "compare.declared: no arm is called 'nothing'"),
        (
            {"own_arms": {"x": {"like": "contrast", "before": {"sink": False}}}},
            "x.before.sink: no arm may set it, as contrast",
        ),
        (
            {"own_arms": {"x": {"like": "both", "before": {"steps": 9}}}},
            "x.before.steps: no arm may set it, as steps follow",
        ),
        (
            {"own_arms": {"x": {"like": "both", "budget": 2}}, "arms": ["x"], "primary": "x"},
            "x.budget: compare.primary sets the unit",
        ),
        ({"own_arms": {"x": {"like": "contrast", "budget": 2}}}, "x.budget: has no effect, as contrast gets none"),
        ({"own_arms": {"x": {"like": "full_contrast", "before": {"from": "y"}}}}, "x.before.from: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "contrast": {"steps": 9}}}}, "x.contrast.steps: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "contrast": {"from": "y"}}}}, "x.contrast.from: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "before": {"epochs": 2}}}}, "x.before.epochs: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "contrast": {"patience": 2}}}}, "x.contrast.patience: no arm may set it"),
        (
            {"own_arms": {"x": {"like": "both", "contrast": {"evaluate_every": 0}}}, "grid": [{}, {"scale": 7}]},
            "x.contrast.evaluate_every: 0 with a compare.grid",
        ),
        (
            {"own_arms": {"x": {"like": "both", "contrast": {"scale": 9}}}, "grid": [{}, {"scale": 7}]},
            "x.contrast.scale: no arm may set it, as every arm takes it from compare.grid",
        ),
    ],
)
def test_unknown_arms_and_keys_without_effect_are_refused(make: Make, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_arms(make(**change).compare)


def test_without_a_grid_an_arm_may_set_what_a_grid_would_choose(make: Make, tmp_path: Path) -> None:
    recipe = make(own_arms={"x": {"like": "both", "contrast": {"scale": 9}}}, arms=["both", "x"])
    x = find_arms(recipe.compare)[1]
    assert choices(recipe) == {"recipe": {}}
    assert contrast_recipe(recipe, x, 0, {}, None, 0, tmp_path).contrast.scale == 9


def test_a_choice_takes_from_the_recipe_what_it_leaves_out(make: Make) -> None:
    defaults = {"learning_rate": 1e-3, "warmup_steps": 2, "scale": 50.0}
    assert choices(make(grid=[{"learning_rate": 1e-4, "scale": 20}, {}, {"warmup_steps": 2}])) == {
        "learning_rate=0.0001-warmup_steps=2-scale=20": {"learning_rate": 1e-4, "warmup_steps": 2, "scale": 20.0},
        "learning_rate=0.001-warmup_steps=2-scale=50": defaults,
    }
