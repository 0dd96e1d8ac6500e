"""The recipe of a run, kept in its output folder, to be looked up, shown as a page or trained again.

Its paths are absolute, so it can be read from any working folder.
"""

import logging
import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from anchorembed.errors import InputError
from anchorembed.model.load import absolute_name
from anchorembed.recipe_file import read_as, show_config
from anchorembed.recipe_schema import Recipe
from anchorembed.system.files import write_file

_log = logging.getLogger(__name__)

KEPT = "recipe.yaml"
_CHARACTERS = 100  # of a value in a message
_HEADER = "# What anchorembed trains here, which each run writes anew. To train it again: anchorembed train "


def keep_recipe(recipe: Recipe) -> None:
    """Write a recipe into its output folder, over that of an earlier run, but not over a file that a user wrote.

    Raises:
        InputError: if it cannot be written.
    """
    path = recipe.output / KEPT
    is_ours = path.is_file() and path.read_bytes().startswith(_HEADER.encode())
    if path.exists() and not is_ours:
        stored: Recipe | None = None
        with suppress(InputError):
            stored = with_absolute_paths(read_as(type(recipe), path))
        if stored != with_absolute_paths(recipe):
            _log.info("%s: not written by anchorembed, and differs from the recipe that is trained. It stays.", path)
    elif not is_ours or path.read_text(encoding="utf-8") != _text(recipe):
        write_file(path, _text(recipe))


def check_kept(recipe: Recipe) -> None:
    """Refuse to train a recipe that a command made if the output folder has another one, which a user may have changed.

    Raises:
        InputError: if it has, with the keys that differ.
    """
    path = recipe.output / KEPT
    if not path.exists():
        return
    cure = "To train by this command, delete that file, or choose another --output."
    try:
        kept = read_as(type(recipe), path)
    except InputError as error:
        raise InputError(f"{error} {cure}") from error
    if differing := "; ".join(_differing(_values(kept), _values(recipe))):
        raise InputError(
            f"{path}: is not the recipe that this command makes: {differing}. To train it as it is: "
            f"anchorembed train {shlex.quote(str(path))}. {cure}"
        )


def _differing(kept: object, made: object, key: str = "") -> Iterator[str]:
    """The values of a recipe that differ from those of another, by dotted key."""
    if isinstance(kept, dict) and isinstance(made, dict):
        for name in kept | made:
            yield from _differing(kept.get(name), made.get(name), f"{key}.{name}".lstrip("."))
    elif kept != made:
        yield f"{key} is {_shown(kept)} there, {_shown(made)} here"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}..."


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths; names that are no local path, such as hub names, stay."""
    return type(recipe).model_validate(_values(recipe))


def _values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, with absolute paths."""
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    for source in values["data"]["sources"]:
        source["path"] = absolute_name(source["path"])
    values["model"]["name"] = absolute_name(values["model"]["name"])
    own_arms = values["compare"]["own_arms"].values() if values["compare"] else ()
    in_arms = [arm[part] for arm in own_arms for part in ("before", "contrast")]
    for stage in filter(None, (values["reconstruct"], values["contrast"], *in_arms)):
        stage |= {key: absolute_name(stage[key]) for key in ("from", "guide") if stage.get(key)}
        if tests := stage.get("evaluate_on"):
            stage["evaluate_on"] = [absolute_name(name) for name in tests]
    if values["compare"]:
        named = values["compare"]["collections"]
        values["compare"]["collections"] = {
            key: [absolute_name(name) for name in names] for key, names in named.items()
        }
    return values | {"output": str(recipe.output.absolute())}


def _text(recipe: Recipe) -> str:
    return f"{_HEADER}{shlex.quote(str(recipe.output.absolute() / KEPT))}\n{show_config(with_absolute_paths(recipe))}"
