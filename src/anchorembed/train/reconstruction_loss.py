"""Stage I's loss: both passes, head and cross-entropies in one module.

Axes: N texts to write, P positions that have a target, T packed tokens, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch
from anchorembed.system.device import autocast
from anchorembed.system.processes import processes
from anchorembed.train.anchor_choice import choose_anchors
from anchorembed.train.anchors import entering
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoding import Decoding, insert_anchors
from anchorembed.train.reconstruction_batch import ReconstructionBatch


class ReconstructionLoss(nn.Module):
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
        step: ReconstructionBatch | None = None,
        bag_weight: float = 0.0,
        decode: bool = True,
        choosing: tuple[Tensor, int] | None = None,
    ) -> tuple[Tensor, ...]:
        """Write text i of ``targets`` from the anchor of source i, or from anchor i; without either, after EOS alone.

        With ``bag_weight`` the same targets are also predicted from the anchor alone, as a bag. ``step`` is given if it
        has no other texts: then all its anchors go through `entering`. With ``choosing``, what each text's choice
        counts and among how many anchors, ``targets`` has each text so many times, and its own anchor, first, must be
        told apart.

        Returns:
            The loss weighted by ``weights_P``, each target token's losses [P] in nats (by decoding, by the bag, and its
            share of its text's choice), and the loss of comparing anchors; zeros for what is not computed. With
            ``choosing`` only the loss's gradient is right. Without targets, the anchors of the sources, [N, H].
        """
        backbone = self.embedder.backbone
        with autocast(backbone.device, self.embedder.dtype):
            if sources is not None:
                anchors_NH = self.embedder(sources)
            if targets is None or weights_P is None:
                if anchors_NH is None:
                    return ()
                if processes() > 1 and torch.is_grad_enabled():
                    # DDP waits for a gradient of every weight, also of the head, which this pass does not use
                    anchors_NH = anchors_NH + 0.0 * backbone.head.weight.sum()
                return (anchors_NH,)
            loss, losses_P, bags_P, choices_P = weights_P.new_zeros(()), *torch.zeros_like(weights_P).expand(3, -1)
            contrast = loss
            if step is not None and sources is not None and anchors_NH is not None:
                (anchors_NH,), contrast = entering(step, anchors_NH, backbone)
            if decode or choosing is not None:
                states_PH = self._decoded(anchors_NH, targets)
                slopes_P = weights_P * float(decode)
                if choosing is not None:
                    choices_P, slopes = self._choices(states_PH, targets, *choosing)
                    slopes_P = slopes_P + slopes
                loss, losses_P = self._cross_entropy(states_PH, targets.targets, slopes_P)
            elif not bag_weight and anchors_NH is not None:  # the anchors' own loss alone is trained, outside
                loss = 0.0 * (anchors_NH.sum() + backbone.head.weight.sum())
            if bag_weight and anchors_NH is not None:
                bags = (targets.counts, targets.owners)
                bag_loss, bags_P = self._cross_entropy(anchors_NH, targets.targets, bag_weight * weights_P, bags)
                loss = loss + bag_loss
        return loss, losses_P, bags_P, choices_P, contrast

    @torch.no_grad()
    def _choices(self, states_PH: Tensor, targets: Decoding, choosing_N: Tensor, choices: int) -> tuple[Tensor, Tensor]:
        """Each token's share of its text's choice of an anchor, and the choice's gradient, both [P]."""
        _, losses_P = self._cross_entropy(states_PH, targets.targets, torch.ones_like(states_PH[:, 0]))
        return choose_anchors(losses_P, targets.owners, choosing_N, choices)

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
