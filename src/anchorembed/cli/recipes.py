"""The recipe of a command: from a file and its options, or from pairs alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchorembed.cli.terminal import fail, print_line, typed_command
from anchorembed.config import Recipe
from anchorembed.errors import InputError
from anchorembed.recipe import read_recipe, show_config


def resolve_recipe(path: Path | None, overrides: list[str] | None, show: bool, skip_bad: bool) -> Recipe | None:
    """Read the recipe, or print the configuration and return None."""
    if path is None:
        if not show:
            raise InputError(
                "a recipe is needed, such as recipes/demo.yaml, or train --pairs, check --pairs. --show-config prints "
                "every key."
            )
        print_line(show_config())
        return None
    recipe = read_recipe(path, [*(overrides or ()), *skipping(skip_bad)])
    if show:
        print_line(show_config(recipe))
        return None
    return recipe


def recipe_of_options(
    recipe: Path | None, pairs: list[str] | None, base: str | None, output: Path | None, set_: list[str]
) -> Recipe:
    """Make the recipe of some pairs."""
    if recipe is not None or not pairs or base is None or output is None:
        raise InputError("give a recipe, or else all of --pairs FILE, --base MODEL and, to train, --output DIR.")
    from anchorembed.model.load import load_config
    from anchorembed.train.default_recipe import recipe_of_pairs

    made = recipe_of_pairs(pairs, base, output, set_)
    load_config(base)
    return made


def recipe_to_train(made: Recipe, show: bool) -> Recipe | None:
    """The recipe that was made of some pairs, unless another is kept; or print its configuration and return None."""
    from anchorembed.train.default_recipe import say_instruction
    from anchorembed.train.kept_recipe import KEPT, check_kept

    if show:
        print_line(show_config(made))
        return None
    check_kept(made)
    if not (made.output / KEPT).exists():  # else training has begun so
        say_instruction(made)
    return made


def skipping(skip_bad: bool) -> list[str]:
    """The override by which unusable lines are dropped."""
    return ["data.skip_bad=true"] if skip_bad else []


@contextmanager
def resumable() -> Iterator[None]:
    """Where what runs within is stopped, print the command that continues it; exit code 128 + the signal's number."""
    from anchorembed.system.processes import leave
    from anchorembed.train.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        leave()
        fail(f"{stop} To continue: {typed_command()}", 128 + stop.signal)
    leave()
