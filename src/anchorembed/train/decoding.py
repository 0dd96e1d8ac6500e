"""Where anchors and targets of Stage I stand, in pure functions that never see a model.

The decoder's input for a text ``x_1 .. x_n`` is ``[anchor, E(x_1) .. E(x_n)]`` and its targets are ``x_1 .. x_n, EOS``:
the anchor stands directly before the first target, and every position from the anchor on has a target.

A *sink* is an EOS before the anchor, ``[E(EOS), anchor, E(x_1) .. E(x_n)]``, that predicts nothing; the paper has none.
Trained decoders make the first position their attention sink (Xiao et al., 2024, arXiv 2309.17453); where that is the
anchor, they write worse until they are trained to (results/README.md).

Axes: N texts, P positions that have a target, T packed tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorembed.model.packing import PackedBatch, pack, send


@dataclass(frozen=True, slots=True)
class Decoding:
    """Texts to be written: ``batch`` has a free slot in each text for its anchor, after a sink if there is one.

    ``slots`` [N] are the anchors' positions, ``predicting`` [P] those with a target, and ``targets`` [P] are theirs;
    text i has ``counts[i]`` of them, and ``owners`` [P] names each target's text.
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
    """Lay out texts, as their own tokens without template, to be written from one anchor each.

    Of a text of more than ``limit`` tokens the first ``limit`` are targets, and no EOS.
    """
    before = [end_id] if sink else []
    targets = [[*text, end_id][: target_count(text, limit)] for text in texts]
    batch = pack([[*before, end_id, *written[:-1]] for written in targets])
    slots = batch.offsets[:-1] + len(before)
    predicting = (batch.positions >= len(before)).nonzero().flatten()
    counts = batch.offsets.diff() - len(before)
    owners = torch.arange(len(texts)).repeat_interleave(counts)
    wanted = torch.tensor([token for written in targets for token in written], dtype=torch.long)
    return Decoding(batch, slots, predicting, wanted, owners, tuple(counts.tolist()))


def insert_anchors(vectors_TH: Tensor, anchors_NH: Tensor, slots: Tensor) -> Tensor:
    """Put each text's anchor, unscaled, into its slot; gradients flow to both."""
    return vectors_TH.index_copy(0, slots, anchors_NH.to(vectors_TH.dtype))
