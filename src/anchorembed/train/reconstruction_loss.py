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
from anchorembed.train.anchor_choice_loss import choose_anchors
from anchorembed.train.anchors import decoder_anchors
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoder_input import Decoding, insert_anchors
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
        """Write each text of ``targets`` from its anchor, and compute the losses; without targets only encode.

        Args:
            sources: texts to encode; text i is written from the anchor of source i.
            targets: texts to write.
            weights_P: weight of each target token's loss.
            anchors_NH: anchors to write from, instead of sources; without either, texts are written after EOS alone.
            step: the step's batch if this is its only micro-batch: its anchors then go through `decoder_anchors`.
            bag_weight: weight of predicting the same targets from the anchor alone, as a bag (`cross_entropy`).
            decode: whether the decoder's loss counts.
            choosing: weight of each text's choice, and number of anchors C to choose from (`anchor_choice_loss`); then
                ``targets`` has each text C times, first from its own anchor.

        Returns:
            The weighted loss, each target token's losses [P] in nats (by decoding, by the bag, and its share of its
            text's choice), and the contrastive loss of the anchors; zeros for what is not computed. With ``choosing``
            only the weighted loss's gradient is right, not its value. Without targets, the anchors of the sources,
            [N, H].
        """
        backbone = self.embedder.backbone
        with autocast(backbone.device, self.embedder.dtype):
            if sources is not None:
                anchors_NH = self.embedder(sources)
            if targets is None or weights_P is None:
                return () if anchors_NH is None else (self._with_head(anchors_NH),)
            loss, losses_P, bags_P, choices_P = weights_P.new_zeros(()), *torch.zeros_like(weights_P).expand(3, -1)
            contrast = loss
            if step is not None and sources is not None and anchors_NH is not None:
                (anchors_NH,), contrast = decoder_anchors(step, anchors_NH, backbone)
            if decode or choosing is not None:
                states_PH = self._decoded(anchors_NH, targets)
                token_weights_P = weights_P * float(decode)
                if choosing is not None:
                    choices_P, gradient_P = self._choices(states_PH, targets, *choosing)
                    token_weights_P = token_weights_P + gradient_P
                loss, losses_P = self._cross_entropy(states_PH, targets.targets, token_weights_P)
            elif not bag_weight and anchors_NH is not None:  # only `contrast` trains, which the caller adds
                loss = 0.0 * anchors_NH.sum() + self._zero_of_head()
            if bag_weight and anchors_NH is not None:
                bags = (targets.counts, targets.owners)
                bag_loss, bags_P = self._cross_entropy(anchors_NH, targets.targets, bag_weight * weights_P, bags)
                loss = loss + bag_loss
        return loss, losses_P, bags_P, choices_P, contrast

    def _with_head(self, anchors_NH: Tensor) -> Tensor:
        """The anchors, from which backward reaches the head, too: DDP waits for a gradient of every weight."""
        if processes() == 1 or not torch.is_grad_enabled():
            return anchors_NH
        return anchors_NH + self._zero_of_head()

    def _zero_of_head(self) -> Tensor:
        """0, with a gradient of 0 for the head's weight and bias."""
        head = self.embedder.backbone.head
        return 0.0 * (head.weight.sum() + (0.0 if head.bias is None else head.bias.sum()))

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
