"""From a recipe to a comparison: its record, its results so far, and its missing runs."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

from anchorembed.compare.arms import Arm, choices, comparison_sections, find_arms, matched_steps
from anchorembed.compare.records import ArmRecord, ComparisonRecord, Run, accuracy_by_choice
from anchorembed.compare.results import Results
from anchorembed.data.pairs import content_of
from anchorembed.errors import InputError
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.tasks import Task, check_instructions
from anchorembed.recipe_schema import Compare, Recipe
from anchorembed.system.files import hash_texts
from anchorembed.train.resume_plan import by_content, model_content


@dataclass(frozen=True, slots=True)
class Comparison:
    """A recipe's comparison: arms by name, its record, its results so far, and the tasks to evaluate.

    ``settings`` is the recipe's section ``compare``.
    """

    recipe: Recipe
    settings: Compare
    arms: dict[str, Arm]
    record: ComparisonRecord
    results: Results
    tasks: list[Task]

    def missing(self) -> list[Run]:
        """Runs without cells for every task."""
        return [run for run in self.record.runs() if self.tasks_left(run)]

    def tasks_left(self, run: Run) -> list[Task]:
        """Tasks that a run has no cell for."""
        done = {cell.collection for cell in self.results.cells_of(run)}
        return [task for task in self.tasks if task.name not in done]

    def arm_record(self, name: str) -> ArmRecord:
        """The record of an arm."""
        return next(arm for arm in self.record.arms if arm.name == name)


def open_comparison(recipe: Recipe, folder: Path, command: str = "") -> Comparison:
    """Read a comparison's results so far, and count FLOPs to match compute; nothing is trained.

    Args:
        recipe: with a compare section.
        folder: results folder.
        command: command that repeats the comparison, for the report.

    Raises:
        InputError: if the recipe lacks a section, contradicts itself, or names unknown arms or tasks.
    """
    _check(recipe)
    compare, _, _ = comparison_sections(recipe)
    arms = find_arms(compare)
    tables = {title: find_tasks(names, quick=compare.quick) for title, names in compare.collections.items()}
    tasks = [task for table in tables.values() for task in table]
    names = [task.name for task in tasks]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"compare.collections: {name} is there twice. Leave one out, or rename it.")
    check_instructions(compare.instructions, tasks)
    steps = matched_steps(recipe, arms)
    record = ComparisonRecord(
        key=_key(recipe, arms),
        title=_portable(f"With and without Stage I: {recipe.model.name}"),
        recipe=_portable(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False)),
        command=_portable(command),
        arms=[_arm_record(compare, arm, steps[arm.name]) for arm in arms],
        primary=compare.primary,
        declared=compare.declared,
        explore=compare.explore,
        choices=list(choices(recipe)),
        notes=compare.notes,
        tables={title: {task.name: task.revision for task in table} for title, table in tables.items()},
    )
    results = Results(folder, record.key, record.revisions)
    return Comparison(recipe, compare, {arm.name: arm for arm in arms}, record, results, tasks)


def _check(recipe: Recipe) -> None:
    """Refuse a recipe without the sections of a comparison, or with settings that have no effect in it."""
    if recipe.model.weights != "float32":
        raise InputError(
            f"model.weights: {recipe.model.weights} is for LoRA alone, and arms of a comparison train all weights. Set "
            "it to float32."
        )
    _, reconstruct, contrast = comparison_sections(recipe)
    if contrast.from_ is not None:
        raise InputError(
            "contrast.from: has no effect in a comparison, where arms say what Stage II starts from. Leave it out."
        )
    for name, stage in (("reconstruct", reconstruct), ("contrast", contrast)):
        if stage.epochs or stage.patience:
            raise InputError(f"{name}: a comparison matches arms by steps. Set steps, and neither epochs nor patience.")
    if len(choices(recipe)) > 1:
        numbers = {"contrast.evaluate_every": contrast.evaluate_every, "data.held_out": recipe.data.held_out}
        for key, number in numbers.items():
            if not number:
                raise InputError(f"{key}: 0 with a compare.grid, which chooses by held-out pairs. Set it above 0.")


def _arm_record(compare: Compare, arm: Arm, steps: int) -> ArmRecord:
    settings = {f"before Stage II: {key}": str(value) for key, value in arm.before_keys.items()}
    settings |= {f"Stage II: {key}": str(value) for key, value in arm.contrast_keys.items()}
    return ArmRecord(
        name=arm.name,
        title=arm.title,
        what=arm.what,
        digest=arm.digest,
        trained=arm.trained,
        longer=arm.longer,
        seeds=compare.seeds if arm.trained else compare.seeds[:1],
        steps=steps,
        settings=settings,
        budget=arm.budget,
    )


def _portable(text: str) -> str:
    """Text with ``$ANCHOREMBED_DATA`` where a path begins with the folder that it names, for other machines."""
    folder = os.environ.get("ANCHOREMBED_DATA")
    if not folder:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(folder.rstrip('/'))}/", "$ANCHOREMBED_DATA/", text)


def _key(recipe: Recipe, arms: Sequence[Arm]) -> str:
    """Hash of all that decides a cell's value, besides arm and seed.

    It covers data, models and tests by content, both stages and the grid; the primary arm, whose compute all others
    match and whose best choice gives the common settings; and the first seed, on whose pairs compute is counted.
    """
    compare, reconstruct, contrast = comparison_sections(recipe)
    # Where an arm keeps its best model, evaluations decide the result, too.
    keeps_best = any(keys.get("keep_best") for arm in arms for keys in (arm.before_keys, arm.contrast_keys))
    changed = {"keep_best": True} if keeps_best else {}
    cost_only = {
        name: stage.model_copy(update=changed).cost_only
        for name, stage in (("reconstruct", reconstruct), ("contrast", contrast))
    }
    values = recipe.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,  # so that a new setting changes no key unless it is set
        exclude={
            "output": True,
            "trackers": True,
            "seed": True,
            "data": {"sources": {"__all__": {"path"}}},
            "model": {"device"},
            "compare": {"arms", "seeds", "own_arms", "collections", "declared", "explore", "notes"},
            **cost_only,
        },
    )
    pairs = {source.name: content_of(source.path) for source in recipe.data.sources}
    values["model"]["name"] = model_content(recipe.model.name)
    values |= {name: by_content(values[name]) for name in ("reconstruct", "contrast")}
    primary = next(arm.digest for arm in arms if arm.name == compare.primary)
    return hash_texts([json.dumps([values, pairs, primary, compare.seeds[0]], sort_keys=True)])


def describe(comparison: Comparison) -> str:
    """A comparison's runs in words, with the hours left once a run is finished."""
    runs, missing, grid = list(comparison.record.runs()), comparison.missing(), len(comparison.record.choices)
    lines = [f"{len(runs)} runs, {len(runs) - len(missing)} of them done; {grid} choices of settings for each arm"]
    for arm in comparison.record.arms:
        seeds = ", ".join(map(str, arm.seeds))
        steps = f"{arm.steps} steps {'more of' if arm.longer else 'before'} Stage II" if arm.steps else "Stage II alone"
        lines.append(f"  {arm.name:<18} seeds {seeds:<10}{steps if arm.trained else 'not trained':<28}{arm.what}")
    if left := hours_left(comparison):
        lines.append(left)
    if ignored := comparison.results.ignored_lines:
        lines.append(f"{ignored} lines of results.jsonl are of other settings or data and are ignored")
    return "\n".join(lines)


def hours_left(comparison: Comparison) -> str:
    """The time left for missing runs and trials, by the time of finished ones; empty if none is missing or finished."""
    results, record, missing = comparison.results, comparison.record, comparison.missing()
    seconds_of_run = {
        run: sum(cost.seconds for cost in results.record(run).costs.values())
        for run in record.runs()
        if results.cells_of(run)
    }
    if not missing or not seconds_of_run:
        return ""
    seconds = sum(_expected_seconds(run, seconds_of_run) for run in missing)
    if len(record.choices) > 1 and results.grid:
        arms = [arm for arm in record.arms if arm.trained]
        trials_left = sum(len(record.choices) - len(accuracy_by_choice(results.grid, arm)) for arm in arms)
        seconds += trials_left * fmean(score.cost.seconds for score in results.grid)
    return f"about {seconds / 3600:.1f} hours to go, by what finished runs took"


def _expected_seconds(run: Run, seconds_of_run: Mapping[Run, float]) -> float:
    """Mean seconds of finished runs of the same arm and setting, else of the same setting, else of all."""
    same_setting = {other: seconds for other, seconds in seconds_of_run.items() if other.setting == run.setting}
    same_arm = [seconds for other, seconds in same_setting.items() if other.arm == run.arm]
    return fmean(same_arm or same_setting.values() or seconds_of_run.values())
