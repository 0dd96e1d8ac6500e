"""Stage I as comparisons need it and users do not: other things to write, and no decoder at all.

An arm may write each document from its own vector (``d2d``), train ordinary next-token prediction on the same texts
(``next_token``), or train the bag of words without the decoder (``decode: false``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from anchorembed.errors import InputError
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Recipe, Reconstruct
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.reconstruction_batch import DIRECTIONS, Direction, Writing
from anchorembed.train.run import contrast, run_stage


class ControlReconstruct(Reconstruct):
    """Settings of Stage I, and those of its controls."""

    directions: Literal["both", "alternate", "q2d", "d2q", "d2d", "next_token"] = Field(  # type: ignore[assignment]
        "both", description="As in Stage I; or documents from their own vectors, or next tokens without a vector."
    )
    decode: bool = Field(True, description="The decoder's loss; false leaves the others' alone, but for next_token.")

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not (self.decode or self.bag_weight or self.read_weight or self.contrast_weight):
            raise ValueError("decode: false leaves no loss; set bag_weight, read_weight or contrast_weight above 0")
        return self


class ArmRecipe(Recipe):
    """A recipe of one stage of an arm."""

    reconstruct: ControlReconstruct | None = Field(None, description="Stage I or a control; null leaves it out.")


@dataclass(frozen=True)
class ControlReconstruction(Reconstruction):
    """Stage I, or a control."""

    settings: ControlReconstruct

    @property
    def decodes(self) -> bool:
        """Whether the decoder's loss is trained; else the bag's alone."""
        return self.settings.decode

    def of_pair(self, pair: TokenPair, direction: Direction) -> list[Writing]:
        """What is written of a pair in a direction."""
        limit = self.settings.target_tokens
        if direction == "d2d":
            return [Writing(pair.document, pair.document_text, direction, limit)]
        if direction == "next_token":
            return [Writing([], text, direction, limit) for text in (pair.query_text, pair.document_text)]
        return super().of_pair(pair, direction)

    def reported_directions(self) -> tuple[Direction, ...]:
        """Both directions, and documents from their own vectors where those are trained."""
        return (*DIRECTIONS, "d2d") if self.settings.directions == "d2d" else DIRECTIONS


def train_arm(recipe: ArmRecipe) -> Path:
    """Train the one stage that an arm's recipe has; returns the model's folder."""
    if (recipe.reconstruct is None) == (recipe.contrast is None):
        raise InputError("recipe: an arm's recipe has one stage. Set the other to null.")
    if recipe.reconstruct is not None:
        return run_stage(recipe, ControlReconstruction, recipe.reconstruct, recipe.model.name)
    return contrast(recipe)
