"""A recipe from YAML, checked, and back as YAML. Every fault is reported at once, with its key path and what to do."""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from anchorembed.errors import InputError, decoded, first_line, nearest
from anchorembed.recipe_schema import UNSET, Recipe, Section

_REMOVED = {  # keys that are refused, and what to write instead
    "compare.seeds_of": "All trained arms have compare.seeds. For arms with other seeds write a second recipe, which "
    "extends this one, with compare.arms and compare.seeds of its own.",
    "compare.own_arms.NAME.first": "Write `before` instead.",
    "reconstruct.decode": "An arm of a comparison may set it: compare.own_arms.NAME.before.",
}

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``a.b=value`` strings whose values are YAML.

    A recipe may begin with ``extends: OTHER``, a recipe in the same folder. Its keys are then added to those of the
    other recipe, or replace them.

    Raises:
        InputError: listing every fault, with its key path.
    """
    return read_as(Recipe, path, overrides)


def read_as(schema: type[AnyRecipe], path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe as `read_recipe` does, validated by ``schema``: `Recipe`, or the subclass of a comparison."""
    return parse_as(schema, _values(Path(path), ()), f"{path} with --set" if overrides else str(path), overrides)


def _values(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Keys and values of a recipe and of those it extends."""
    if path.is_file() and path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl", ".parquet")):
        raise InputError(
            f"{path}: a file of pairs, by its name, not a recipe. Name it in data.sources of a recipe, or train without"
            f" one: anchorembed train --pairs {shlex.quote(str(path))} --base MODEL --output DIR (it writes one; check "
            "takes the same)."
        )
    try:
        values = load_yaml(decoded(path, path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Name a recipe, such as recipes/demo.yaml.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}). Name a recipe, such as recipes/demo.yaml.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, not keys and values. Start with `data:`.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in extending:
        fault = f"extends {base!r}, which is no file's name" if not isinstance(base, str) else "extends itself"
        raise InputError(f"{path}: {fault}. Name another recipe.")
    inherited = _values(path.parent / base, (*extending, path.resolve()))
    try:
        return _merged(inherited, values)
    except RecursionError as error:
        raise InputError(f"{path}: holds itself by a YAML alias. Write its values out.") from error


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values merged into its base's, section by section; a list replaces a list, steps replace epochs."""
    merged = base | values
    if "steps" in values and "epochs" not in values:
        merged.pop("epochs", None)
    for key in base.keys() & values.keys():
        if isinstance(base[key], dict) and isinstance(values[key], dict):
            merged[key] = _merged(base[key], values[key])
    return merged


def parse_recipe(values: dict[str, Any], origin: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Validate a recipe given as nested dictionaries, with ``overrides``; raises as `read_recipe` does."""
    return parse_as(Recipe, values, origin, overrides)


def parse_as(schema: type[AnyRecipe], values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Validate a recipe as `parse_recipe` does, by ``schema``: `Recipe`, or the subclass of a comparison."""
    values = dict(values)
    for override in overrides:
        _set(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = [dict(fault) for fault in error.errors(include_url=False)]
        unset = [fault for fault in faults if fault["type"] == UNSET]  # often all paths use the same variable
        lines = [f"{origin}: {_explain(fault, schema)}" for fault in faults if fault not in unset[1:]]
        lines += [f"{origin}: {len(unset) - 1} more values name variables that are not set."] if unset[1:] else []
        raise InputError("\n".join(lines)) from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which `yaml.SafeLoader` drops the first value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - PyYAML's
        node = super().compose_mapping_node(anchor)
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            tag_and_text = (key.tag, str(key.value))
            if tag_and_text in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} is there twice, keep one")
            keys.add(tag_and_text)
        return node


def load_yaml(text: str) -> Any:  # noqa: ANN401 - any value
    """The value of a YAML text; raises yaml.YAMLError or ValueError if it is not YAML, or a mapping has a key twice."""
    return yaml.load(text, _UniqueKeys)  # noqa: S506 - as safe as its base


def show_config(recipe: Recipe | None = None) -> str:
    """Every key with its meaning, and its value or, without a recipe, its default, as commented YAML."""
    values = recipe.model_dump(mode="json", by_alias=True) if recipe else {}
    return "\n".join(_lines(type(recipe) if recipe else Recipe, values, 0)) + "\n"


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: not of the form a.b=value.")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict | None):
            raise InputError(f"--set {override!r}: {parent!r} has no keys of its own. Set it as a whole.")
        values[parent] = dict(child or {})  # a copy: by a YAML alias, another key may hold the same dictionary
        values = values[parent]
    try:
        values[last] = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--set {override!r}: the value is not YAML ({first_line(error)}). Quote it.") from error
    if text.count("#") > str(values[last]).count("#"):
        raise InputError(f"--set {override!r}: YAML takes # and what follows for a comment. Quote it: {key}='\"...\"'.")
    if last == "steps":
        values.pop("epochs", None)


def _explain(fault: dict[str, Any], schema: type[Recipe]) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    removed = ".".join([*path[:2], "NAME", *path[3:]] if path[:2] == ["compare", "own_arms"] else path)
    if fault["type"] == "extra_forbidden" and removed in _REMOVED:
        return f"unknown key {key!r}. {_REMOVED[removed]}"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{nearest(path[-1], _known(schema, path[:-1]))}"
    if fault["type"] == "missing":
        return f"missing key {key!r}. Add it; --show-config says what it means."
    value, message = fault["input"], fault["msg"].removeprefix("Value error, ")
    is_quoted = fault["type"] == "value_error" and isinstance(value, dict | list)  # by the message, as far as needed
    cure = " Quote it." if fault["type"] == "string_type" else ""
    if key == "reconstruct.directions" and value in ("d2d", "next_token"):  # only arms of a comparison have them
        arm = "auto" if value == "d2d" else value
        cure = f" To compare with it, add the arm {arm} to compare.arms and run `anchorembed compare`."
    return f"{key if is_quoted else f'{key} is {value!r}'}: {message[0].lower()}{message[1:]}.{cure}"


def _known(schema: type[Recipe], path: list[str]) -> list[str]:
    """Keys of the section at a path."""
    section: type[Section] = schema
    for part in path:
        field = next((f for name, f in section.model_fields.items() if part in (name, f.alias)), None)
        if field is not None:
            section = _section(field.annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section(annotation: object) -> type[Section] | None:
    """The section in an annotation such as ``Section``, ``Section | None`` or ``list[Section]``."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _lines(section: type[BaseModel], values: dict[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in section.model_fields.items():
        key = field.alias or name
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json", by_alias=True)
        value = values.get(key, None if field.is_required() else default)
        yield from textwrap.wrap(f"{indent}# {field.description}", 110, subsequent_indent=f"{indent}# ")
        inner = None if get_origin(field.annotation) is dict else _section(field.annotation)
        listed = isinstance(value, list) and value
        if inner and not listed and (value or field.is_required() or not values):
            yield f"{indent}{key}:" + ("  # null unless given" if default is None and not field.is_required() else "")
            yield from _lines(inner, value if isinstance(value, dict) else {}, depth + 1)
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        yield f"{indent}{key}: {'# required' if field.is_required() and not values else text}"
