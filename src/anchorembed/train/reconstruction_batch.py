"""A step of Stage I, laid out on the CPU and sent to the device. Nothing here sees a model.

Axes: N texts to write, R = N * choices of an anchor (`anchor_choice_loss`), P positions with a target, D directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anchorembed.model.packing import PackedBatch, pack, send
from anchorembed.train.decoder_input import Decoding, decoding, target_count

Direction = Literal["q2d", "d2q", "d2d", "next_token"]  # the last two are controls (`compare.controls`)
Anchor = Literal["raw", "centred", "centred_gradient"]
DIRECTIONS: tuple[Direction, ...] = ("q2d", "d2q")


@dataclass(frozen=True, slots=True)
class Writing:
    """A text to write.

    Attributes:
        source: templated ids of the text whose anchor it is written from; empty for next tokens.
        text: its own tokens.
        direction: the task.
        limit: most tokens to write; None for all.
        rows: the anchors that it is written from, among those of the step; its own first (`anchor_choice_loss`).
    """

    source: list[int]
    text: list[int]
    direction: Direction
    limit: int | None = None
    rows: tuple[int, ...] = (0,)

    @property
    def targets(self) -> int:
        """Target tokens."""
        return target_count(self.text, self.limit)

    @property
    def cost(self) -> int:
        """Tokens computed in both passes if there is a sink; one fewer for each row without."""
        return len(self.source) + len(self.rows) * (self.targets + 1)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Texts to write at once.

    Attributes:
        sources: texts to encode; None for next tokens.
        targets: texts to write, each once per choice of an anchor.
        weights_P: weight of each target's loss; 0 if it is written from another text's anchor.
        masks_DP: 1 for the targets of a direction; 0 if written from another text's anchor.
        sides_N: 0 for a text written from a query, 1 from a document, -1 in an idle micro-batch.
        rows_R: the anchors of each text among those of the step.
        choosing_N: weight of choosing each text's own anchor.
    """

    sources: PackedBatch | None
    targets: Decoding
    weights_P: Tensor
    masks_DP: Tensor
    sides_N: Tensor
    rows_R: Tensor
    choosing_N: Tensor

    @property
    def choices(self) -> int:
        """Anchors that each text is written from."""
        return len(self.rows_R) // len(self.sides_N)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on ``device``."""
        sources = None if self.sources is None else self.sources.to(device)
        tensors = (self.weights_P, self.masks_DP, self.sides_N, self.rows_R, self.choosing_N)
        return MicroBatch(sources, self.targets.to(device), *(send(tensor, device) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class ReconstructionBatch:
    """A step on the device.

    Attributes:
        micro_batches: those of this process.
        idle: how many of them, the first, have weight 0: sharded weights are gathered in each forward pass, so all
            processes must run equally many.
        pairs: number of pairs of all processes.
        weights: weight of each direction's loss.
        totals: target tokens of each direction in all processes.
        anchor: how anchors enter the decoder (`anchors`).
        excluded_QD: documents that must not be negatives of a query; None if anchors are not compared.
        contrast_weight: weight of the contrastive loss of the anchors.
    """

    micro_batches: list[MicroBatch]
    idle: int
    pairs: int
    weights: dict[Direction, float]
    totals: dict[Direction, int]
    anchor: Anchor
    excluded_QD: Tensor | None = None
    contrast_weight: float = 0.0


def lay_out(
    writings: Sequence[Writing],
    per_token: Mapping[Direction, float],
    per_text: Mapping[Direction, float],
    end_id: int,
    sink: bool,
    is_idle: bool = False,
) -> MicroBatch:
    """Lay out writings on the CPU; ``per_token`` and ``per_text`` weigh a direction's target tokens and choices."""
    is_anchored, choices = all(writing.source for writing in writings), len(writings[0].rows)
    sources = pack([writing.source for writing in writings]) if is_anchored else None
    texts = [writing.text for writing in writings for _ in range(choices)]
    targets = decoding(texts, end_id, sink and is_anchored, writings[0].limit)
    owners_P, is_own_P = targets.owners // choices, (targets.owners % choices == 0).float()
    weights_P = torch.tensor([per_token[writing.direction] for writing in writings])[owners_P] * is_own_P
    masks_DN = torch.tensor([[float(writing.direction == name) for writing in writings] for name in per_token])
    sides_N = torch.tensor([-1 if is_idle else int(writing.direction != "q2d") for writing in writings])
    rows_R = torch.tensor([row for writing in writings for row in writing.rows])
    choosing_N = torch.tensor([per_text[writing.direction] for writing in writings])
    masks_DP = masks_DN[:, owners_P] * is_own_P
    return MicroBatch(sources, targets, weights_P, masks_DP, sides_N, rows_R, choosing_N)
