"""Positions of anchors and targets in Stage I's decoder input. Pure functions that never see a model.

The decoder's input for a text ``x_1 .. x_n`` is ``[anchor, E(x_1) .. E(x_n)]`` and its targets are ``x_1 .. x_n, EOS``:
the anchor stands directly before the first target, and every position from the anchor on has a target.

A *sink* is an EOS before the anchor, ``[E(EOS), anchor, E(x_1) .. E(x_n)]``, that predicts nothing. The paper has none.
Pretrained decoders make the first position their attention sink (Xiao et al., 2024, arXiv 2309.17453). If the anchor is
there, they write worse until training has adapted them (results/README.md).

Axes: N texts, P positions that have a target, T packed tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorembed.model.packing import PackedBatch, pack, send


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoder input of texts to write, and their targets.

    Attributes:
        batch: tokens, with a slot in each text for its anchor, after the sink if there is one.
        slots: positions of the anchors, [N].
        predicting: positions that have a target, [P].
        targets: token id of each target, [P].
        owners: index of each target's text, [P].
        counts: number of targets of each text.
    """

    batch: PackedBatch
    slots: Tensor
    predicting: Tensor
    targets: Tensor
    owners: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> "Decoding":
        """Return the same on ``device``."""
        tensors = (self.slots, self.predicting, self.targets, self.owners)
        slots, predicting, targets, owners = (send(tensor, device) for tensor in tensors)
        return Decoding(self.batch.to(device), slots, predicting, targets, owners, self.counts)


def target_count(text: Sequence[int], limit: int | None = None) -> int:
    """How many targets a text has: its tokens and EOS, or its first ``limit`` tokens where it has more."""
    return len(text) + 1 if limit is None or len(text) <= limit else limit


def decoding(texts: Sequence[Sequence[int]], end_id: int, sink: bool = False, limit: int | None = None) -> Decoding:
    """Lay out texts (token ids without template), each to be written from one anchor.

    Of a text of more than ``limit`` tokens the first ``limit`` are targets, and no EOS.
    """
    before = [end_id] if sink else []
    written = [[*text, end_id][: target_count(text, limit)] for text in texts]
    batch = pack([[*before, end_id, *ids[:-1]] for ids in written])
    slots = batch.offsets[:-1] + len(before)
    predicting = (batch.positions >= len(before)).nonzero().flatten()
    counts = batch.offsets.diff() - len(before)
    owners = torch.arange(len(texts)).repeat_interleave(counts)
    targets = torch.tensor([token for ids in written for token in ids], dtype=torch.long)
    return Decoding(batch, slots, predicting, targets, owners, tuple(counts.tolist()))


def insert_anchors(vectors_TH: Tensor, anchors_NH: Tensor, slots: Tensor) -> Tensor:
    """Put each text's anchor, unscaled, into its slot; gradients flow to both."""
    return vectors_TH.index_copy(0, slots, anchors_NH.to(vectors_TH.dtype))
