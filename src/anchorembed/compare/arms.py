"""The arms of a comparison, and their recipes: one for the stage before Stage II, if an arm has it, one for Stage II.

What an arm trains beside Stage II's own steps costs as much as the primary arm's Stage I, in model FLOPs (`flops`), a
count that is the same on every machine. Pairs, their order and Stage II's own steps are the same for all arms.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from anchorembed.compare.controls import ArmRecipe
from anchorembed.errors import InputError, nearest
from anchorembed.model.adapters import merge_lora
from anchorembed.recipe_file import parse_as
from anchorembed.recipe_schema import Choice, Compare, Contrast, OwnArm, Recipe, Reconstruct
from anchorembed.system.files import hash_texts
from anchorembed.train.memory_estimate import ON_CPU
from anchorembed.train.prepare import Prepared, prepare
from anchorembed.train.resume_plan import by_content
from anchorembed.train.run import check_settings

_COUNTED_STEPS = 20  # over which a stage's mean FLOPs are counted

Values = dict[str, Any]
StageBefore = Literal["nothing", "reconstruct", "contrast"]


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm: ``before`` is the stage before Stage II; ``before_keys`` and ``contrast_keys`` replace the recipe's."""

    name: str
    title: str
    what: str
    before: StageBefore = "nothing"
    before_keys: Values = field(default_factory=dict)
    contrast_keys: Values = field(default_factory=dict)
    longer: bool = False  # Stage II has more steps, which cost what others train before it
    trained: bool = True
    budget: float = 1.0  # of the primary arm's Stage I compute

    @property
    def digest(self) -> str:
        """Hash of the arm's settings, and of the guide and tests that they name, which decide its results."""
        before, contrast = by_content(self.before_keys), by_content(self.contrast_keys)
        settings: list[object] = [self.before, before, contrast, self.longer, self.trained]
        settings += [self.budget] if self.budget != 1 else []
        return hash_texts([json.dumps(settings, sort_keys=True)])[:8]


READY_ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "Base model", "The LLM as it is, never trained to embed.", trained=False),
        Arm("contrast", "Contrastive only", "Stage II from the base model."),
        Arm(
            "contrast_longer",
            "Contrastive only, equal compute",
            "Stage II from the base model, longer by Stage I's model FLOPs.",
            longer=True,
        ),
        Arm(
            "q2d",
            "EBQ2D + contrastive",
            "Stage I writes documents from queries' vectors only.",
            "reconstruct",
            {"directions": "q2d"},
        ),
        Arm(
            "d2q",
            "EBD2Q + contrastive",
            "Stage I writes queries from documents' vectors only.",
            "reconstruct",
            {"directions": "d2q"},
        ),
        Arm(
            "both",
            "Both + contrastive",
            "The paper's method: Stage I in both directions as the recipe has it, then Stage II.",
            "reconstruct",
        ),
        Arm(
            "auto",
            "Auto-encoding + contrastive",
            "Before Stage II each document is written from its own vector.",
            "reconstruct",
            {"directions": "d2d"},
        ),
        Arm(
            "full_contrast",
            "Full contrastive + contrastive",
            "Before Stage II, contrastive learning of all weights at Stage I's learning rate.",
            "contrast",
            {"lora": None},
        ),
        Arm(
            "next_token",
            "Next token + contrastive",
            "Before Stage II, ordinary next-token training on the same texts.",
            "reconstruct",
            {"directions": "next_token"},
        ),
    )
}


def find_arms(compare: Compare) -> list[Arm]:
    """The arms of a recipe, ready ones and those of ``own_arms``.

    Raises:
        InputError: if an arm is unknown or has impossible settings.
    """
    arms = dict(READY_ARMS)
    for name, own_arm in compare.own_arms.items():
        if name in READY_ARMS:
            raise InputError(f"compare.own_arms: {name!r} is a ready arm. Choose another name.")
        parent = _arm_named(own_arm.like, arms, "compare.own_arms")
        _check_own_arm(compare, name, own_arm, parent)
        arms[name] = replace(
            parent,
            name=name,
            title=own_arm.title or name,
            what=own_arm.what or f"As {parent.name}, with other settings.",
            before_keys=parent.before_keys | own_arm.before,
            contrast_keys=parent.contrast_keys | own_arm.contrast,
            budget=own_arm.budget or parent.budget,
        )
    _check_tests(compare, arms)
    chosen = [arms[name] for name in compare.arms]
    by_title: dict[str, Arm] = {}
    for arm in chosen:
        if (other := by_title.setdefault(arm.title, arm)) is not arm:
            raise InputError(
                f"compare.own_arms: {other.name} and {arm.name} have the same title, {arm.title!r}. Change one, as the "
                "report names arms by their titles."
            )
    return chosen


def _check_own_arm(compare: Compare, name: str, own_arm: OwnArm, parent: Arm) -> None:
    """Refuse keys of an own arm that have no effect, or that other settings decide."""
    before, contrast = own_arm.before.keys(), own_arm.contrast.keys()
    lengths, in_grid = {"steps", "epochs", "patience"}, Choice.model_fields.keys() if compare.grid else set()
    for stage, refused, why in (
        ("before", before if parent.before == "nothing" else (), f"{parent.name} trains nothing before Stage II"),
        ("contrast", () if parent.trained else contrast, f"{parent.name} is not trained"),
        ("before", before & lengths, "steps follow from the primary arm's compute"),
        ("before", before & {"from"}, "every arm starts from the recipe's model"),
        ("contrast", contrast & {"from"}, "Stage II starts from what comes before it"),
        ("contrast", contrast & lengths, "Stage II's steps are the same for all arms"),
        ("contrast", contrast & in_grid, "every arm takes it from compare.grid"),
    ):
        for key in sorted(refused):
            raise InputError(f"compare.own_arms.{name}.{stage}.{key}: no arm may set it, as {why}. Leave it out.")
    if len(compare.grid) > 1 and own_arm.contrast.get("evaluate_every") == 0:
        raise InputError(
            f"compare.own_arms.{name}.contrast.evaluate_every: 0 with a compare.grid, which chooses by held-out pairs. "
            "Set it above 0."
        )
    budget = own_arm.budget or parent.budget
    if budget != 1 and name == compare.primary:
        raise InputError(f"compare.own_arms.{name}.budget: compare.primary sets the unit. Leave it out.")
    if budget != 1 and parent.before == "nothing" and not parent.longer:
        raise InputError(f"compare.own_arms.{name}.budget: has no effect, as {parent.name} gets none. Leave it out.")


def _check_tests(compare: Compare, arms: Mapping[str, Arm]) -> None:
    """Refuse tests of unknown arms, and tests that are left out or made anyway."""
    explored = [name for arm, others in compare.explore.items() for name in (arm, *others)]
    for key, names in (("declared", compare.declared), ("explore", explored), ("arms", compare.arms)):
        for name in names:
            _arm_named(name, arms, f"compare.{key}")
    if compare.primary not in compare.arms:
        raise InputError(f"compare.primary: {compare.primary!r} is not among compare.arms. Add it.")
    for arm, others in compare.explore.items():
        if arm in (compare.primary, *others):
            why = "is in its own list" if arm in others else "is compare.primary, tested against all others anyway"
            raise InputError(f"compare.explore: {arm!r} {why}. Leave it out.")
    if compare.primary in compare.declared:
        raise InputError(f"compare.declared: {compare.primary!r} is compare.primary, tested against the others.")


def _arm_named(name: str, arms: Mapping[str, Arm], key: str) -> Arm:
    if name not in arms:
        raise InputError(f"{key}: no arm is called {name!r}.{nearest(name, arms)} Arms: {', '.join(arms)}.")
    return arms[name]


def comparison_sections(recipe: Recipe) -> tuple[Compare, Reconstruct, Contrast]:
    """The sections of a recipe that a comparison needs.

    Raises:
        InputError: if one is missing.
    """
    if recipe.compare is None:
        raise InputError("recipe: it has no compare section. Add one, as recipes/compare.yaml has it.")
    if recipe.reconstruct is None or recipe.contrast is None:
        missing = "contrast" if recipe.reconstruct else "reconstruct"
        raise InputError(f"recipe: {missing} is null. A comparison needs both stages; give it settings.")
    return recipe.compare, recipe.reconstruct, recipe.contrast


def before_recipe(recipe: Recipe, arm: Arm, seed: int, steps: int, output: Path) -> ArmRecipe | None:
    """The recipe of an arm's stage before Stage II, with ``steps`` steps; None if it has none."""
    _, reconstruct, contrast = comparison_sections(recipe)
    if arm.before == "nothing":
        return None
    stage_one = reconstruct.model_dump(mode="json")
    if arm.before == "reconstruct":
        settings = stage_one | {"steps": steps} | arm.before_keys
        return _arm_recipe(recipe, arm, seed, output, reconstruct=settings, contrast=None)
    like_stage_one = {key: stage_one[key] for key in ("learning_rate", "warmup_steps", "weight_decay")}
    settings = contrast.model_dump(mode="json", by_alias=True) | like_stage_one | {"steps": steps, "from": None}
    return _arm_recipe(recipe, arm, seed, output, reconstruct=None, contrast=settings | arm.before_keys)


def contrast_recipe(
    recipe: Recipe, arm: Arm, seed: int, choice: Values, start: str | None, extra_steps: int, output: Path
) -> ArmRecipe:
    """Stage II of an arm, from the model ``start``, with the grid's ``choice``; ``extra_steps`` if it is ``longer``."""
    _, _, contrast = comparison_sections(recipe)
    settings = contrast.model_dump(mode="json", by_alias=True) | arm.contrast_keys | choice
    settings |= {"from": start, "steps": settings["steps"] + (extra_steps if arm.longer else 0)}
    return _arm_recipe(recipe, arm, seed, output, reconstruct=None, contrast=settings)


def choices(recipe: Recipe) -> dict[str, Values]:
    """Stage II settings of the grid, by their name in results and folders; without a grid none, named ``recipe``."""
    compare, _, contrast = comparison_sections(recipe)
    if not compare.grid:
        return {"recipe": {}}
    defaults = contrast.model_dump(include=set(Choice.model_fields))
    listed = [defaults | choice.model_dump(exclude_none=True) for choice in compare.grid]
    return {"-".join(f"{key}={value:g}" for key, value in choice.items()): choice for choice in listed}


def stage_flops(recipe: ArmRecipe, prepared: Prepared) -> float:
    """Mean model FLOPs of a step of an arm's recipe, which has one stage, on the comparison's data and base model."""
    stage_class, settings = recipe.only_stage()
    backbone = prepared.embedder.backbone
    backbone.requires_grad_(requires_grad=True)
    stage = stage_class.build(prepared.embedder, settings, settings.budget(ON_CPU))
    order = prepared.order(settings.batch_size, recipe.seed)
    flops = [
        stage.flops(number, prepared.tokens(indices, stage.hard_negatives))
        for number, indices in enumerate(islice(order, min(_COUNTED_STEPS, settings.steps)))
    ]
    merge_lora(backbone)  # untrained adapters change no weight
    return sum(flops) / len(flops)


def matched_steps(recipe: Recipe, arms: Sequence[Arm]) -> dict[str, int]:
    """Steps of each arm that cost its ``budget`` of the primary's Stage I: before Stage II, or in it if ``longer``.

    Raises:
        InputError: if an arm cannot be trained with its settings.
    """
    compare, reconstruct, _ = comparison_sections(recipe)
    seed = compare.seeds[0]
    recipes: dict[str, ArmRecipe | None] = {}
    trained: list[tuple[Arm, ArmRecipe]] = []
    for arm in arms:
        before = before_recipe(recipe, arm, seed, reconstruct.steps, recipe.output)
        stage_two = contrast_recipe(recipe, arm, seed, {}, None, 0, recipe.output)
        recipes[arm.name] = stage_two if arm.longer else before
        trained += [(arm, stage) for stage in (before, stage_two) if stage and arm.trained]
        if arm.name == compare.primary and before is None:
            raise InputError(f"compare.primary: {arm.name!r} has no stage before Stage II. Name one that has.")
    prepared = prepare(recipe.model_copy(update={"seed": seed}), recipe.model.name)
    for arm, stage in trained:
        try:
            check_settings(*stage.only_stage(), prepared)
        except InputError as error:
            raise InputError(f"arm {arm.name}: {error}") from error
    flops = {name: stage_flops(counted, prepared) for name, counted in recipes.items() if counted}
    unit = flops[compare.primary] * reconstruct.steps
    return {arm.name: max(1, round(arm.budget * unit / flops[arm.name])) if arm.name in flops else 0 for arm in arms}


def _arm_recipe(recipe: Recipe, arm: Arm, seed: int, output: Path, **stages: Values | None) -> ArmRecipe:
    values = recipe.model_dump(mode="json", by_alias=True, exclude={"compare"})
    return parse_as(ArmRecipe, values | stages | {"seed": seed, "output": str(output)}, f"arm {arm.name}")
