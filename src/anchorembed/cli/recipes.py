"""The recipe of a command: from a file and its options, or from pairs alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from anchorembed.cli.terminal import fail, print_line, typed_command
from anchorembed.errors import InputError
from anchorembed.recipe_file import read_recipe, show_config
from anchorembed.recipe_schema import Recipe


def resolve_recipe(
    path: Path | None, overrides: list[str] | None, show: bool = False, skip_bad: bool = False
) -> Recipe:
    """Read the recipe, or print the configuration and stop."""
    changes = [*(overrides or ()), *skipping(skip_bad)]
    if path is None and (changes or not show):
        raise InputError(
            "a recipe is needed, such as recipes/demo.yaml, or train --pairs, check --pairs. --show-config alone prints"
            " every key."
        )
    recipe = read_recipe(path, changes) if path else None
    if recipe is None or show:
        print_line(show_config(recipe))
        raise typer.Exit
    return recipe


def recipe_of_options(
    recipe: Path | None, pairs: list[str] | None, base: str | None, output: Path | None, set_: list[str]
) -> Recipe:
    """Make a recipe from the options that replace one."""
    if recipe is not None or not pairs or base is None or output is None:
        raise InputError("give a recipe, or else all of --pairs FILE, --base MODEL and, to train, --output DIR.")
    from anchorembed.model.load import load_config
    from anchorembed.train.default_recipe import recipe_of_pairs

    of_pairs = recipe_of_pairs(pairs, base, output, set_)
    load_config(of_pairs.model.name)
    return of_pairs


def show_or_check(recipe: Recipe, show: bool) -> None:
    """Print the configuration made from pairs and stop, or refuse it if its output folder has another recipe."""
    from anchorembed.train.default_recipe import say_instruction
    from anchorembed.train.kept_recipe import KEPT, check_kept

    if show:
        print_line(show_config(recipe))
        raise typer.Exit
    check_kept(recipe)
    if not (recipe.output / KEPT).exists():  # else a run that has begun has logged it
        say_instruction(recipe)


def skipping(skip_bad: bool) -> list[str]:
    """The override that drops unusable lines, or none."""
    return ["data.skip_bad=true"] if skip_bad else []


@contextmanager
def resumable() -> Iterator[None]:
    """If the block is interrupted by a signal, print the command that continues it, and exit with 128 + its number."""
    from anchorembed.system.processes import leave_group
    from anchorembed.train.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        leave_group()
        fail(f"{stop} To continue: {typed_command()}", 128 + stop.signal)
    leave_group()
