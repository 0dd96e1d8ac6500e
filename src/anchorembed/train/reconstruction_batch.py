"""What a step of Stage I writes, laid out on the CPU and sent to the device. Nothing here sees a model.

Axes: N texts to write, R texts times choices of an anchor, P positions that have a target, D directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anchorembed.model.packing import PackedBatch, pack, send
from anchorembed.train.decoding import Decoding, decoding, target_count

Direction = Literal["q2d", "d2q", "d2d", "next_token"]  # the last two are controls of a comparison
Anchor = Literal["raw", "centred", "centred_gradient"]
DIRECTIONS: tuple[Direction, ...] = ("q2d", "d2q")


@dataclass(frozen=True, slots=True)
class Writing:
    """One text to write: from which templated ids (none for next tokens), which own tokens, which direction that is.

    ``limit`` is the most tokens of the text that are written; None for all. It is written from the anchors in ``rows``
    of the step's, its own first (`anchor_choice`).
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
    def side(self) -> int:
        """0 if it is written from a query, 1 from a document."""
        return int(self.direction != "q2d")

    @property
    def cost(self) -> int:
        """Tokens computed in both passes, at most: with a sink."""
        return len(self.source) + len(self.rows) * (self.targets + 1)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Texts to write at once: ``masks_DP`` says which targets are of which direction, ``weights_P`` what they count.

    Those written from another text's anchor count for nothing there. ``sides_N`` is 0 for a text written from a query,
    1 from a document, -1 where it counts for nothing; ``rows_R`` are those of each text's
    ``choices`` anchors among the step's, and ``choosing_N`` is what choosing its own counts.
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
    """A step's pairs on the device: this process's micro-batches, and the pairs and target tokens of all processes.

    The first ``idle`` micro-batches count for nothing: sharded weights are gathered in each forward, so all processes
    must do equally many. ``anchor`` says how anchors enter the decoder. ``excluded_QD`` marks documents that are no
    negatives of a query, where anchors are compared, too, with ``contrast_weight``.
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
    """Lay out writings on the CPU; each target token, and each text's choice, counts what its direction's do."""
    is_anchored, choices = all(writing.source for writing in writings), len(writings[0].rows)
    sources = pack([writing.source for writing in writings]) if is_anchored else None
    texts = [writing.text for writing in writings for _ in range(choices)]
    targets = decoding(texts, end_id, sink and is_anchored, writings[0].limit)
    owners_P, is_own_P = targets.owners // choices, (targets.owners % choices == 0).float()
    weights_P = torch.tensor([per_token[writing.direction] for writing in writings])[owners_P] * is_own_P
    masks_DN = torch.tensor([[float(writing.direction == name) for writing in writings] for name in per_token])
    sides_N = torch.tensor([-1 if is_idle else writing.side for writing in writings])
    rows_R = torch.tensor([row for writing in writings for row in writing.rows])
    choosing_N = torch.tensor([per_text[writing.direction] for writing in writings])
    masks_DP = masks_DN[:, owners_P] * is_own_P
    return MicroBatch(sources, targets, weights_P, masks_DP, sides_N, rows_R, choosing_N)
