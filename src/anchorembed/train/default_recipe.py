"""The default recipe for pairs and a model: contrastive learning, with steps by the number of pairs."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorembed.errors import InputError
from anchorembed.model.metadata import find_metadata
from anchorembed.model.sentence_transformers_settings import EmbedderSettings, find_embedder_settings
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.prepare import open_pairs

_log = logging.getLogger(__name__)

_BATCH, _EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 32, 3, 30, 1000


def default_contrast(
    pairs: int, batch_size: int | None = None, steps: int | None = None, epochs: float | None = None
) -> dict[str, Any]:
    """Settings of Stage II for a number of pairs: 3 epochs, but 30 to 1,000 steps, of ``batch_size`` pairs or of 32.

    Of given ``steps`` or ``epochs``, too, a tenth is warm-up.
    """
    batch = batch_size or min(_BATCH, max(2, pairs // 4))  # from 8 pairs on at least 4 steps an epoch
    if epochs is not None:
        steps = math.ceil(epochs * pairs / batch)
    elif steps is None:
        steps = min(max(math.ceil(_EPOCHS * pairs / batch), _FEWEST_STEPS), _MOST_STEPS)
    return {
        "steps": steps,
        "batch_size": batch,
        "warmup_steps": steps // 10,
        "learning_rate": 1e-3,
        "scale": 20.0,
        "evaluate_every": 0,
    }


def recipe_of_pairs(paths: Sequence[str], base: str, output: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The default recipe that trains a model on files of pairs.

    Args:
        paths: as ``data.sources.path`` in a recipe.
        base: the model to start from.
        output: folder of the run.
        overrides: ``a.b=value`` of the recipe.

    Raises:
        InputError: if the pairs cannot be read, a path is named twice, or an override is wrong.
    """
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"--pairs: {repeated} is named twice. Name it once.")
    names = [Path(path).name.split(".")[0] or path for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    values: dict[str, Any] = {
        "data": {"sources": [{"name": name, "path": path} for name, path in zip(names, paths, strict=True)]},
        "model": {"name": base},
        "output": str(output),
    }
    pairs = len(open_pairs(parse_recipe(values, "--pairs", overrides)))
    return with_default_contrast(values, pairs, "--pairs", overrides)


def with_default_contrast(values: dict[str, Any], pairs: int, location: str, overrides: Sequence[str]) -> Recipe:
    """The recipe ``values`` with `default_contrast`, which follows steps, epochs and batch size that are given.

    Raises:
        InputError: as `parse_recipe` does.
    """
    given = parse_recipe(values, location, overrides).contrast
    length = given.model_dump(include={"batch_size", "steps", "epochs"}, exclude_unset=True) if given else {}
    contrast = default_contrast(pairs, **length) | values.get("contrast", {})
    return parse_recipe(values | {"contrast": contrast}, location, overrides)


def say_instruction(recipe: Recipe) -> None:
    """Log that queries get no instruction, unless the recipe gives one or the model is an embedder already."""
    name = recipe.model.name
    settings = find_metadata(name) or find_embedder_settings(name)
    has_prompt = isinstance(settings, EmbedderSettings) or (settings and settings.prompts.query)
    if not (any(recipe.data.instructions) or has_prompt):
        _log.info("queries get no instruction; to give one: --set data.instruction='Given a question, ...'")
