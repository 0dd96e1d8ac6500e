"""Experimental controls of Stage I, which only comparisons have.

An arm may write each document from its own vector (``d2d``), train ordinary next-token prediction on the same texts
(``next_token``), or train Stage I's added losses without the decoder's (``decode: false``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from anchorembed.errors import InputError
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Recipe, Reconstruct, Schedule
from anchorembed.train.contrast import Contrastive
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.reconstruction_batch import DIRECTIONS, Direction, Writing
from anchorembed.train.run import run_stage
from anchorembed.train.stage import Stage


class ControlReconstruct(Reconstruct):
    """Settings of Stage I, and those of its controls."""

    directions: Literal["both", "alternate", "q2d", "d2q", "d2d", "next_token"] = Field(  # type: ignore[assignment]
        "both", description="As in Stage I; d2d: documents from their own vectors; next_token: without vectors."
    )
    decode: bool = Field(
        True, description="Train the decoder's loss; false trains the added losses alone. next_token always trains it."
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not (self.decode or self.bag_weight or self.read_weight or self.contrast_weight):
            raise ValueError("decode: false leaves no loss; set bag_weight, read_weight or contrast_weight above 0")
        return self


@dataclass(frozen=True)
class ControlReconstruction(Reconstruction):
    """Stage I, or a control."""

    settings: ControlReconstruct

    @property
    def decodes(self) -> bool:
        """Whether the decoder's loss is trained."""
        return self.settings.decode

    def of_pair(self, pair: TokenPair, direction: Direction) -> list[Writing]:
        """Texts of a pair that are written in a direction."""
        limit = self.settings.target_tokens
        if direction == "d2d":
            return [Writing(pair.document, pair.document_text, direction, limit)]
        if direction == "next_token":
            return [Writing([], text, direction, limit) for text in (pair.query_text, pair.document_text)]
        return super().of_pair(pair, direction)

    def reported_directions(self) -> tuple[Direction, ...]:
        """Directions that a report measures: both, and ``d2d`` if it is trained."""
        return (*DIRECTIONS, "d2d") if self.settings.directions == "d2d" else DIRECTIONS


class ArmRecipe(Recipe):
    """A recipe of one stage of an arm."""

    reconstruct: ControlReconstruct | None = Field(None, description="Stage I or a control; null leaves it out.")

    def only_stage(self) -> tuple[type[Stage], Schedule]:
        """The class and the settings of the recipe's one stage.

        Raises:
            InputError: if the recipe has no stage, or two.
        """
        if self.reconstruct is not None and self.contrast is None:
            return ControlReconstruction, self.reconstruct
        if self.contrast is not None and self.reconstruct is None:
            return Contrastive, self.contrast
        raise InputError("recipe: an arm's recipe has one stage. Set the other to null.")


def train_arm(recipe: ArmRecipe) -> Path:
    """Train the one stage that an arm's recipe has; returns the model's folder."""
    stage_class, settings = recipe.only_stage()
    return run_stage(recipe, stage_class, settings, recipe.model_before)
