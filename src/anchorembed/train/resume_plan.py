"""The plan of a stage: all that decides its result. A checkpoint has it, and is resumed only by the same plan."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anchorembed.data.pairs import content_of
from anchorembed.errors import InputError, extra
from anchorembed.model.backbone import forward_settings
from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.load import load_config
from anchorembed.model.metadata import read_metadata, saved_sha256
from anchorembed.recipe_schema import Recipe, Reconstruct, Schedule
from anchorembed.system.files import hash_content, hash_file, hash_texts
from anchorembed.train.checkpoint import Plan, read_plan

_SOURCES, _CONTENT = "data.sources.", ".content"  # before and after a source's name in the key of its pairs


def plan_of(recipe: Recipe, name: str, settings: Schedule, start: str) -> Plan:
    """The settings and contents that decide a stage's result, by dotted key.

    Left out are settings that change only cost, and ``skip_steps``, which decides whether a stage goes on. Data, local
    models and tests are there as content hashes, so a run can be resumed after their folders are moved.
    """
    in_float32 = isinstance(settings, Reconstruct) and settings.lora is None  # whatever model.weights is
    parts = {
        "data": recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}}),
        "model": recipe.model.model_dump(
            mode="json", exclude={"device", "name"} | ({"weights"} if in_float32 else set())
        ),
        name: by_content(
            settings.model_dump(
                mode="json",
                by_alias=True,
                exclude=settings.cost_only | {"from_", "skip_steps"} | settings.other_models.keys(),
            )
        ),
    }
    contents = {f"{_SOURCES}{source.name}{_CONTENT}": content_of(source.path) for source in recipe.data.sources}
    contents |= {key: model_content(model) for key, model in settings.other_models.items()}
    return _flatten(parts) | contents | {"seed": recipe.seed, "start": model_content(start)}


def by_content(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings, with content hashes instead of names for its guide and the tests that it is evaluated on."""
    hashes: dict[str, Any] = {}
    if guide := settings.get("guide"):
        hashes["guide"] = model_content(os.path.expandvars(guide))  # an arm of a comparison has names as written
    if tests := settings.get("evaluate_on"):
        with extra("eval"):
            from anchorembed.evaluate.find import find_tasks  # noqa: PLC0415 - an extra

        hashes["evaluate_on"] = [task.revision for task in find_tasks([os.path.expandvars(test) for test in tests])]
    return settings | hashes


def model_content(model: str) -> str:
    """Identify a model: a hash of what decides a saved embedder's vectors, of other local files, or a hub name."""
    if model == DEFAULT_MODEL:  # whatever a folder of that name holds
        return model
    path = Path(model).expanduser()
    metadata, weights = read_metadata(path), saved_sha256(path)
    if metadata is None or not weights:
        return hash_content(path) if path.exists() else model
    settings = json.dumps(asdict(replace(metadata, history={})), sort_keys=True)
    return hash_texts([weights, forward_settings(load_config(str(path))), hash_file(path / "tokenizer.json"), settings])


def _flatten(values: object, prefix: str = "") -> Plan:
    if isinstance(values, dict) and values:
        items = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: values}


def trained_content(folder: Path, source: str) -> object:
    """The content hash of a source's pairs with which a stage's folder was begun; None if it can begin with any."""
    finished = read_metadata(folder / "model")
    plan = finished.history.get("plan") if finished else read_plan(folder / "checkpoints")
    return plan.get(f"{_SOURCES}{source}{_CONTENT}") if isinstance(plan, dict) else None


def check_same_plan(folder: Path, before: object, now: Plan, extended_by: str = "") -> None:
    """Refuse to resume a stage that was started with another plan, and name the differences.

    ``extended_by`` names the settings that train a complete stage's model further.
    """
    if not isinstance(before, dict):
        return
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if not changed:
        return
    pairs = [key for key in changed if key.startswith(_SOURCES) and key in before and key in now]
    faults = [
        f"{folder}: the pairs of {key.removeprefix(_SOURCES).removesuffix(_CONTENT)} changed since training began."
        if key in pairs
        else f"{folder}: {key} was {before.get(key)!r}, is {now.get(key)!r} now."
        for key in changed
    ]
    changes = "the pairs" if pairs == changed else "the recipe and the pairs" if pairs else "the recipe"
    cures = [f"Restore {changes}, choose another output, or delete that folder."]
    if extended_by:
        cures.append(f"The stage is complete. To train its model further, choose another output and {extended_by}.")
    raise InputError("\n".join([*faults, *cures]))
