"""Stage I's loss: both passes, head and cross-entropies in one module.

Axes: N texts to write, P positions that have a target, T packed tokens, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anchorembed.model.backbone import Backbone, Head
from anchorembed.model.embedder import Embedder
from anchorembed.system.device import autocast
from anchorembed.system.processes import processes
from anchorembed.train.anchor_choice_loss import choose_anchors
from anchorembed.train.anchors import decoder_anchors
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoder_input import Decoding, insert_anchors
from anchorembed.train.reconstruction_batch import MicroBatch, ReconstructionBatch


class ReconstructionLoss(nn.Module):
    """Both passes, head and loss of Stage I in one ``forward``, so that DDP or FSDP wraps all of them.

    ``bag_weight`` is that of predicting a text's targets from its anchor alone, as a bag (`cross_entropy`).
    """

    def __init__(self, embedder: Embedder, bag_weight: float) -> None:
        super().__init__()
        self.embedder = embedder
        self.bag_weight = bag_weight

    def forward(
        self,
        micro: MicroBatch,
        anchors_NH: Tensor | None = None,
        step: ReconstructionBatch | None = None,
        *,
        encode_only: bool = False,
        decode: bool = True,
    ) -> tuple[Tensor, ...]:
        """Write each text from its anchor, and compute the losses.

        Args:
            micro: texts to encode and to write; without texts to encode, they are written after EOS alone.
            anchors_NH: anchors to write from, instead of those of the texts to encode.
            step: the step's batch if this is its only micro-batch: its anchors then go through `decoder_anchors`.
            encode_only: return the anchors, [N, H], alone.
            decode: whether the decoder's loss counts.

        Returns:
            The weighted loss, each target token's losses [3, P] in nats (by decoding, by the bag, and its share of its
            text's choice), and the contrastive loss of the anchors; zeros for what is not computed. Where texts choose
            among anchors only the weighted loss's gradient is right, not its value.
        """
        backbone, targets, weights_P = self.embedder.backbone, micro.targets, micro.weights_P
        with autocast(backbone.device, self.embedder.dtype):
            if anchors_NH is None and micro.sources is not None:
                anchors_NH = self.embedder(micro.sources)
            if encode_only and anchors_NH is not None:
                return (self._with_head(anchors_NH),)
            loss = contrast = weights_P.new_zeros(())
            losses_3P = weights_P.new_zeros(3, len(weights_P))
            if step is not None and anchors_NH is not None:
                (anchors_NH,), contrast = decoder_anchors(step, anchors_NH, backbone)
            if decode or micro.choices > 1:
                states_PH = decoder_states(backbone, targets, anchors_NH)
                if len(targets.predicting) < len(states_PH):
                    states_PH = states_PH[targets.predicting]
                token_weights_P = weights_P * float(decode)
                if micro.choices > 1:
                    losses_3P[2], gradient_P = self._choices(states_PH, micro)
                    token_weights_P = token_weights_P + gradient_P
                loss, losses_3P[0] = head_loss(backbone.head, states_PH, targets.targets, token_weights_P)
            elif not self.bag_weight and anchors_NH is not None:  # only `contrast` trains, which the caller adds
                loss = 0.0 * anchors_NH.sum() + self._zero_of_head()
            if self.bag_weight and anchors_NH is not None:
                bags, bag_weights_P = (targets.counts, targets.owners), self.bag_weight * weights_P
                bag_loss, losses_3P[1] = head_loss(backbone.head, anchors_NH, targets.targets, bag_weights_P, bags)
                loss = loss + bag_loss
        return loss, losses_3P, contrast

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
    def _choices(self, states_PH: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Each token's share of its text's choice of an anchor, and the choice's gradient, both [P]."""
        weights_P = torch.ones_like(micro.weights_P)
        _, losses_P = head_loss(self.embedder.backbone.head, states_PH, micro.targets.targets, weights_P)
        return choose_anchors(losses_P, micro.targets.owners, micro.choosing_N, micro.choices)


def decoder_states(backbone: Backbone, targets: Decoding, anchors_NH: Tensor | None) -> Tensor:
    """The decoder's states, [T, H], of texts written from anchors, or after EOS alone."""
    vectors_TH = backbone.embed(targets.batch.tokens)
    if anchors_NH is not None:
        vectors_TH = insert_anchors(vectors_TH, anchors_NH, targets.slots)
    return backbone.states(vectors_TH, targets.batch)


def head_loss(
    head: Head,
    states: Tensor,
    targets_P: Tensor,
    weights_P: Tensor,
    bags: tuple[Sequence[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` by the model's output head."""
    return linear_cross_entropy(states, head.weight, targets_P, weights_P, head.bias, head.scale, head.softcap, bags)
