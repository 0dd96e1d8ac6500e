"""What decides a stage's result: its plan, kept with checkpoints and models, so that nothing else is continued."""

from pathlib import Path

from anchorembed.config import Recipe, Schedule
from anchorembed.errors import InputError
from anchorembed.model.embedder import saved_sha256
from anchorembed.system.files import hash_content
from anchorembed.train.checkpoint import Plan


def plan_of(recipe: Recipe, name: str, settings: Schedule, start: str) -> Plan:
    """What decides a stage's result, flat, as JSON values; what only decides its cost is left out.

    Data and local models stand there by what they hold, so that a run goes on where folders were moved.
    """
    stage_one_only = {"weights"} if name == "reconstruct" else set()  # its weights are float32 whatever Stage II's are
    parts = {
        "data": recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}}),
        "model": recipe.model.model_dump(mode="json", exclude={"device", "name"} | stage_one_only),
        name: settings.model_dump(
            mode="json", by_alias=True, exclude=settings.cost_only | {"from_"} | settings.other_models.keys()
        ),
    }
    contents = {f"data.sources.{source.name}.content": hash_content(source.path) for source in recipe.data.sources}
    contents |= {key: model_content(model) for key, model in settings.other_models.items()}
    return _flatten(parts) | contents | {"seed": recipe.seed, "start": model_content(start)}


def model_content(model: str) -> str:
    """SHA-256 of the weights of a model we saved, or of the files of another local one; the name of one on the hub."""
    path = Path(model).expanduser()
    return saved_sha256(path) or (hash_content(path) if path.exists() else model)


def _flatten(values: object, prefix: str = "") -> Plan:
    if isinstance(values, dict) and values:
        items = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: values}


def check_same_plan(folder: Path, before: object, now: Plan, extended_by: str = "") -> None:
    """Refuse to continue what was started with other settings, and say which.

    ``extended_by`` are the settings that train the model of a complete stage further.
    """
    if not isinstance(before, dict):
        return
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        faults = [f"{folder}: {key} was {before.get(key)!r}, is {now.get(key)!r} now." for key in changed]
        cures = ["Restore the recipe, choose another output, or delete that folder."]
        if extended_by:
            cures.append(f"The stage is complete. To train its model further, choose another output and {extended_by}.")
        raise InputError("\n".join([*faults, *cures]))
