"""The arms of a comparison: each has an ordinary recipe for the stage before Stage II, and one for Stage II.

An arm's stage before Stage II gets the compute of the primary arm's Stage I, in model FLOPs (`flops`), a count that is
the same on every machine. Pairs, their order and Stage II's steps are the same for all arms.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from anchorembed.compare.controls import ArmRecipe, ControlReconstruction
from anchorembed.errors import InputError, nearest
from anchorembed.model.adapters import merge_lora
from anchorembed.recipe import parse_as
from anchorembed.recipe_schema import Choice, Compare, OwnArm, Recipe, Schedule
from anchorembed.system.files import hash_texts
from anchorembed.train.contrast import Contrastive
from anchorembed.train.memory_estimate import ON_CPU
from anchorembed.train.prepare import Prepared, prepare
from anchorembed.train.stage import Stage

_COUNTED = 20  # steps over which a stage's mean FLOPs are counted

Values = dict[str, Any]
Before = Literal["nothing", "reconstruct", "contrast"]


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm: ``before`` is the stage before Stage II; ``before_keys`` and ``contrast_keys`` replace the recipe's."""

    name: str
    title: str
    what: str
    before: Before = "nothing"
    before_keys: Values = field(default_factory=dict)
    contrast_keys: Values = field(default_factory=dict)
    longer: bool = False  # Stage II gets Stage I's compute as well
    trained: bool = True
    budget: float = 1.0  # of the primary arm's Stage I compute

    @property
    def digest(self) -> str:
        """Hash of the arm's settings, which decide its results."""
        settings: list[object] = [self.before, self.before_keys, self.contrast_keys, self.longer, self.trained]
        settings += [self.budget] if self.budget != 1 else []
        return hash_texts([json.dumps(settings, sort_keys=True)])[:8]


READY = {
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
    """The arms of a recipe, ready ones and its own.

    Raises:
        InputError: if an arm is unknown or has impossible settings.
    """
    known = dict(READY)
    for name, own in compare.own_arms.items():
        if name in READY:
            raise InputError(f"compare.own_arms: {name!r} is a ready arm. Choose another name.")
        like = _named(own.like, known, "compare.own_arms")
        _possible(compare, name, own, like)
        known[name] = replace(
            like,
            name=name,
            title=own.title or name,
            what=own.what or f"As {like.name}, with other settings.",
            before_keys=like.before_keys | own.before,
            contrast_keys=like.contrast_keys | own.contrast,
            budget=own.budget or like.budget,
        )
    explored = [name for arm, others in compare.explore.items() for name in (arm, *others)]
    for where, names in (("declared", compare.declared), ("explore", explored), ("arms", compare.arms)):
        for name in names:
            _named(name, known, f"compare.{where}")
    chosen = [known[name] for name in compare.arms]
    if compare.primary not in compare.arms:
        raise InputError(f"compare.primary: {compare.primary!r} is not among compare.arms. Add it.")
    for arm, others in compare.explore.items():
        if arm in (compare.primary, *others):
            why = "is in its own list" if arm in others else "is compare.primary, tested against all others anyway"
            raise InputError(f"compare.explore: {arm!r} {why}. Leave it out.")
    if compare.primary in compare.declared:
        raise InputError(f"compare.declared: {compare.primary!r} is compare.primary, tested against the others.")
    return chosen


def _possible(compare: Compare, name: str, own: OwnArm, like: Arm) -> None:
    """Refuse keys of an own arm that another setting decides."""
    chosen = sorted(own.contrast.keys() & set(Choice.model_fields)) if compare.grid else []
    for stage, keys, why in (
        ("before", own.before if like.before == "nothing" else (), f"{like.name} trains nothing before Stage II"),
        ("contrast", () if like.trained else own.contrast, f"{like.name} is not trained"),
        ("before", own.before.keys() & {"steps"}, "steps follow from the primary arm's compute"),
        ("before", own.before.keys() & {"from"}, "every arm starts from the recipe's model"),
        ("contrast", own.contrast.keys() & {"from"}, "Stage II starts from what comes before it"),
        ("contrast", own.contrast.keys() & {"steps"}, "Stage II's steps are the same for all arms"),
        ("contrast", chosen, "every arm takes it from compare.grid"),
    ):
        for key in keys:
            raise InputError(f"compare.own_arms.{name}.{stage}.{key}: no arm may set it, as {why}. Leave it out.")
    budget = own.budget or like.budget
    if budget != 1 and name == compare.primary:
        raise InputError(f"compare.own_arms.{name}.budget: compare.primary sets the unit. Leave it out.")
    if budget != 1 and like.before == "nothing" and not like.longer:
        raise InputError(f"compare.own_arms.{name}.budget: has no effect, as {like.name} gets none. Leave it out.")


def _named(name: str, known: Mapping[str, Arm], key: str) -> Arm:
    if name not in known:
        raise InputError(f"{key}: no arm is called {name!r}.{nearest(name, known)} Arms: {', '.join(known)}.")
    return known[name]


def before_recipe(recipe: Recipe, arm: Arm, seed: int, steps: int, output: Path) -> ArmRecipe | None:
    """The recipe of an arm's stage before Stage II, with ``steps`` steps; None if it has none."""
    if arm.before == "nothing" or recipe.reconstruct is None or recipe.contrast is None:
        return None
    stage_one = recipe.reconstruct.model_dump(mode="json")
    if arm.before == "reconstruct":
        keys = stage_one | {"steps": steps} | arm.before_keys
        return _derive(recipe, arm, seed, output, reconstruct=keys, contrast=None)
    like_stage_one = {key: stage_one[key] for key in ("learning_rate", "warmup_steps", "weight_decay")}
    stage_two = recipe.contrast.model_dump(mode="json", by_alias=True)
    return _derive(
        recipe,
        arm,
        seed,
        output,
        reconstruct=None,
        contrast=stage_two | like_stage_one | {"steps": steps, "from": None} | arm.before_keys,
    )


def contrast_recipe(
    recipe: Recipe, arm: Arm, seed: int, choice: Values, start: str | None, extra: int, output: Path
) -> ArmRecipe:
    """Stage II of an arm, from the model ``start``, with the grid's ``choice`` and ``extra`` steps."""
    if recipe.contrast is None:
        raise InputError("recipe: contrast is null. A comparison needs Stage II.")
    settings = recipe.contrast.model_dump(mode="json", by_alias=True) | arm.contrast_keys | choice
    settings |= {"from": start, "steps": settings["steps"] + (extra if arm.longer else 0)}
    return _derive(recipe, arm, seed, output, reconstruct=None, contrast=settings)


def choices(recipe: Recipe) -> dict[str, Values]:
    """Stage II settings of the grid, by their name in results and folders; an empty ``recipe`` if there is no grid."""
    if recipe.compare is None or recipe.contrast is None:
        raise InputError("recipe: it has no compare section. Add one, as recipes/compare.yaml has it.")
    if not recipe.compare.grid:
        return {"recipe": {}}
    defaults = recipe.contrast.model_dump(include=set(Choice.model_fields))
    listed = [defaults | choice.model_dump(exclude_none=True) for choice in recipe.compare.grid]
    return {"-".join(f"{key}={value:g}" for key, value in choice.items()): choice for choice in listed}


def stage_flops(recipe: ArmRecipe, prepared: Prepared) -> float:
    """Mean model FLOPs of a step of an arm's recipe, which has one stage, on the comparison's data and base model."""
    backbone = prepared.embedder.backbone
    backbone.requires_grad_(requires_grad=True)
    kind: type[Stage] = Contrastive if recipe.reconstruct is None else ControlReconstruction
    settings: Schedule | None = recipe.reconstruct or recipe.contrast
    if settings is None:
        raise ValueError("the recipe has no stage")
    stage = kind.build(prepared.embedder, settings, settings.budget(ON_CPU))
    order = prepared.order(settings.batch_size, recipe.seed)
    counted = [
        stage.flops(number, prepared.tokens(indices, stage.hard_negatives))
        for number, indices in enumerate(islice(order, min(_COUNTED, settings.steps)))
    ]
    merge_lora(backbone)  # untrained adapters change no weight
    return sum(counted) / len(counted)


def matched_steps(recipe: Recipe, arms: list[Arm]) -> dict[str, int]:
    """Steps of each arm that cost its ``budget`` of the primary's Stage I: before Stage II, or in it if ``longer``."""
    compare = recipe.compare
    if compare is None or recipe.reconstruct is None:
        raise InputError("recipe: compare needs both a compare section and reconstruct. Add what is missing.")
    seed, steps = compare.seeds[0], recipe.reconstruct.steps
    nowhere = Path(recipe.output)
    primary = _named(compare.primary, {arm.name: arm for arm in arms}, "compare.primary")
    of_primary = before_recipe(recipe, primary, seed, steps, nowhere)
    if of_primary is None:
        raise InputError(f"compare.primary: {primary.name!r} has no stage before Stage II. Name one that has.")
    prepared = prepare(recipe.model_copy(update={"seed": seed}), recipe.model.name)
    budget = stage_flops(of_primary, prepared) * steps
    matched: dict[str, int] = {}
    for arm in arms:
        before = before_recipe(recipe, arm, seed, steps, nowhere)
        stage_two = contrast_recipe(recipe, arm, seed, {}, None, 0, nowhere)  # always made, so that faults show here
        stage = stage_two if arm.longer else before
        if arm.name == primary.name or stage is None:
            matched[arm.name] = steps if stage else 0
        else:
            matched[arm.name] = max(1, round(arm.budget * budget / stage_flops(stage, prepared)))
    return matched


def _derive(recipe: Recipe, arm: Arm, seed: int, output: Path, **stages: Values | None) -> ArmRecipe:
    values = recipe.model_dump(mode="json", by_alias=True, exclude={"compare"})
    return parse_as(ArmRecipe, values | stages | {"seed": seed, "output": str(output)}, f"arm {arm.name}")
