"""Both passes, head and loss of Stage I in one module.

Axes: N texts to write, P positions that have a target, T packed tokens, H hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch
from anchorembed.system.device import autocast
from anchorembed.system.processes import processes
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoding import Decoding, insert_anchors


class ReconstructionModule(nn.Module):
    """Both passes, head and loss of Stage I in one ``forward``, so that DDP or FSDP wraps all of them."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(
        self,
        sources: PackedBatch | None,
        targets: Decoding | None,
        weights_P: Tensor | None = None,
        anchors_NH: Tensor | None = None,
        centre: Callable[[Tensor], Tensor] | None = None,
        bag_weight: float = 0.0,
        decode: bool = True,
    ) -> tuple[Tensor, ...]:
        """Write text i of ``targets`` from the anchor of source i, or from anchor i; without either, after EOS alone.

        With ``bag_weight`` the same targets are also predicted from the anchor alone, as a bag. ``centre`` is applied
        to the anchors of sources before they enter the decoder.

        Returns:
            The loss weighted by ``weights_P``, and each target token's losses [P] in nats, by decoding and by the bag;
            zeros for a loss that is not computed. Without targets, the anchors of the sources, [N, H].
        """
        backbone = self.embedder.backbone
        with autocast(backbone.device, self.embedder.dtype):
            if sources is not None:
                anchors_NH = self.embedder(sources)
                anchors_NH = anchors_NH if centre is None else centre(anchors_NH)
            if targets is None or weights_P is None:
                if anchors_NH is None:
                    return ()
                if processes() > 1 and torch.is_grad_enabled():
                    # DDP waits for a gradient of every weight, also of the head, which this pass does not use
                    anchors_NH = anchors_NH + 0.0 * backbone.head.weight.sum()
                return (anchors_NH,)
            loss, losses_P, bags_P = weights_P.new_zeros(()), torch.zeros_like(weights_P), torch.zeros_like(weights_P)
            if decode:
                states_PH = self._decoded(anchors_NH, targets)
                loss, losses_P = self._cross_entropy(states_PH, targets.targets, weights_P)
            if bag_weight and anchors_NH is not None:
                bags = (targets.counts, targets.owners)
                bag_loss, bags_P = self._cross_entropy(anchors_NH, targets.targets, bag_weight * weights_P, bags)
                loss = loss + bag_loss
        return loss, losses_P, bags_P

    def _decoded(self, anchors_NH: Tensor | None, targets: Decoding) -> Tensor:
        """States that have a target, [P, H]."""
        backbone = self.embedder.backbone
        vectors_TH = backbone.embed(targets.batch.tokens)
        if anchors_NH is not None:
            vectors_TH = insert_anchors(vectors_TH, anchors_NH, targets.slots)
        states_PH = backbone.states(vectors_TH, targets.batch)
        if len(targets.predicting) < len(states_PH):
            states_PH = states_PH[targets.predicting]
        return states_PH

    def _cross_entropy(
        self, states: Tensor, targets_P: Tensor, weights_P: Tensor, bags: tuple[Sequence[int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        head = self.embedder.backbone.head
        return linear_cross_entropy(
            states, head.weight, targets_P, weights_P, head.bias, head.scale, head.softcap, bags
        )
