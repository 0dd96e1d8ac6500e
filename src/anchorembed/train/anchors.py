"""A step's anchors between encoder and decoder: compared, centred, or shared among its texts.

In the paper they enter the decoder unchanged.

Axes: N texts, Q queries, D documents, R texts times choices of an anchor, S sides, H hidden size.
"""

import torch
from torch import Tensor, nn

from anchorembed.model.backbone import Backbone
from anchorembed.system.processes import full_tensor, summed_with_gradient
from anchorembed.train.contrastive_losses import info_nce
from anchorembed.train.reconstruction_batch import ReconstructionBatch

_SCALE = 20.0  # of cosines where anchors are compared with each other


def decoder_anchors(batch: ReconstructionBatch, anchors_NH: Tensor, backbone: Backbone) -> tuple[list[Tensor], Tensor]:
    """The vectors that enter the decoder in each micro-batch, and the weighted contrastive loss of the anchors.

    The vectors are made from this process's anchors, or from those of all processes if texts choose among them. The
    loss compares the uncentred anchors of all queries and documents; it is 0 if the batch has none.
    """
    entering_NH, contrast = anchors_NH, anchors_NH.new_zeros(())
    if batch.excluded_QD is not None:
        queries_QH, documents_DH = _gathered(batch, anchors_NH).view(batch.pairs, 2, -1).unbind(1)
        contrast = batch.contrast_weight * info_nce(queries_QH, documents_DH, _SCALE, batch.excluded_QD)
    if batch.anchor != "raw":
        sides_N = torch.cat([micro.sides_N for micro in batch.micro_batches])
        length = full_tensor(backbone.mean_token_norm())
        entering_NH = centred(anchors_NH, sides_N, length, gradient_only=batch.anchor == "centred_gradient")
    if batch.micro_batches[0].choices == 1:
        return [*entering_NH.split([len(micro.sides_N) for micro in batch.micro_batches])], contrast
    shared_NH = _gathered(batch, entering_NH)
    return [shared_NH[micro.rows_R] for micro in batch.micro_batches], contrast


def _gathered(batch: ReconstructionBatch, anchors_NH: Tensor) -> Tensor:
    """The anchors of all processes, in the step's order."""
    rows_N = torch.cat([micro.rows_R[:: micro.choices] for micro in batch.micro_batches])
    is_used_N = torch.cat([micro.sides_N for micro in batch.micro_batches]) >= 0
    return in_step_order(anchors_NH, rows_N, is_used_N.to(anchors_NH.dtype), batch.pairs * len(batch.weights))


def in_step_order(anchors_NH: Tensor, rows_N: Tensor, is_used_N: Tensor, rows: int) -> Tensor:
    """Anchors of all processes in the order of the step's texts, [rows, H].

    ``rows_N`` is the row of each of this process's anchors; ``is_used_N`` is 0 for anchors of idle micro-batches, 1
    for others.
    """
    shared = anchors_NH.new_zeros(rows, anchors_NH.shape[1])
    return summed_with_gradient(shared.index_add(0, rows_N, anchors_NH * is_used_N[:, None]))


def centred(anchors_NH: Tensor, sides_N: Tensor, length: Tensor, gradient_only: bool = False) -> Tensor:
    """Subtract the mean of a side from its anchors, and scale them: ``length * (e - mean) / |e - mean|``.

    A decoder that ignores its anchor sends every anchor the same gradient, which makes them all alike; without their
    mean they cannot become so. Batch normalisation prevents posterior collapse in the same way (Zhu et al., BN-VAE,
    2020, arXiv 2004.12585). The paper does not centre.

    Args:
        anchors_NH: this process's anchors of the whole step.
        sides_N: side of each anchor, 0 or 1; each side has its own mean, over all processes.
        length: length of each result, that of a token's input vector.
        gradient_only: leave the anchors unchanged, and subtract the mean from their gradients.
    """
    with torch.autocast(anchors_NH.device.type, enabled=False):  # float32, as anchors differ little from their mean
        is_side_SN = torch.stack([sides_N == side for side in (0, 1)]).to(anchors_NH.dtype)
        sums_SH, counts_S = summed_with_gradient(is_side_SN @ anchors_NH), summed_with_gradient(is_side_SN.sum(1))
        means_SH = sums_SH / counts_S.clamp(min=1)[:, None]
        shifted_NH = anchors_NH - means_SH[sides_N]
        if gradient_only:
            return anchors_NH.detach() + (shifted_NH - shifted_NH.detach())
        return length * nn.functional.normalize(shifted_NH, dim=-1)
