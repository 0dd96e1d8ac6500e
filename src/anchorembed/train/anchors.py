"""What a step's anchors go through between encoder and decoder: compared, centred, and shared among its texts.

As they are, as the paper has it, they go through nothing.

Axes: N texts, Q queries, D documents, R texts times choices of an anchor, S sides, H hidden size.
"""

import torch
from torch import Tensor, nn

from anchorembed.model.backbone import Backbone
from anchorembed.system.processes import full_tensor, summed_with_gradient
from anchorembed.train.contrastive_losses import info_nce
from anchorembed.train.reconstruction_batch import ReconstructionBatch

_SCALE = 20.0  # of cosines where anchors are compared with each other


def entering(batch: ReconstructionBatch, anchors_NH: Tensor, backbone: Backbone) -> tuple[list[Tensor], Tensor]:
    """What enters the decoder in each micro-batch, of this process's anchors; where texts choose, of all's.

    Also the weighted loss of comparing all queries' anchors with all documents', as they are; 0 without such a loss.
    """
    entering_NH, contrast = anchors_NH, anchors_NH.new_zeros(())
    if batch.excluded_QD is not None:
        queries_QH, documents_DH = _of_all(batch, anchors_NH).view(batch.pairs, 2, -1).unbind(1)
        contrast = batch.contrast_weight * info_nce(queries_QH, documents_DH, _SCALE, batch.excluded_QD)
    if batch.anchor != "raw":
        sides_N = torch.cat([micro.sides_N for micro in batch.micro_batches])
        length = full_tensor(backbone.mean_token_norm())
        entering_NH = centred(anchors_NH, sides_N, length, gradient_only=batch.anchor == "centred_gradient")
    if batch.micro_batches[0].choices == 1:
        return [*entering_NH.split([len(micro.sides_N) for micro in batch.micro_batches])], contrast
    shared_NH = _of_all(batch, entering_NH)
    return [shared_NH[micro.rows_R] for micro in batch.micro_batches], contrast


def _of_all(batch: ReconstructionBatch, anchors_NH: Tensor) -> Tensor:
    """All processes' anchors in the step's order, from this process's."""
    rows_N = torch.cat([micro.rows_R[:: micro.choices] for micro in batch.micro_batches])
    counts_N = torch.cat([micro.sides_N for micro in batch.micro_batches]) >= 0
    return in_step_order(anchors_NH, rows_N, counts_N.to(anchors_NH.dtype), batch.pairs * len(batch.weights))


def in_step_order(anchors_NH: Tensor, rows_N: Tensor, counts_N: Tensor, rows: int) -> Tensor:
    """Anchors of all processes as a step has its texts, [rows, H], from this process's, which stand in ``rows_N``.

    ``counts_N`` is 0 for those that are there for nothing.
    """
    shared = anchors_NH.new_zeros(rows, anchors_NH.shape[1])
    return summed_with_gradient(shared.index_add(0, rows_N, anchors_NH * counts_N[:, None]))


def centred(anchors_NH: Tensor, sides_N: Tensor, length: Tensor, gradient_only: bool = False) -> Tensor:
    """Anchors of a step without what all of a side share: ``length * (e - mean) / |e - mean|``.

    A decoder that ignores its anchor sends every anchor the same gradient, which makes them all alike; less their mean
    they cannot become so. It is what batch normalisation does against posterior collapse (Zhu et al., BN-VAE, 2020,
    arXiv 2004.12585). The paper has none.

    Args:
        anchors_NH: this process's anchors of the whole step.
        sides_N: which side's each is, 0 or 1; sides have means of their own, over all processes.
        length: what each becomes long, that of a token's input vector.
        gradient_only: leave the anchors as they are, and take the mean off their gradients instead.
    """
    with torch.autocast(anchors_NH.device.type, enabled=False):  # what anchors share is most of them
        is_side_SN = torch.stack([sides_N == side for side in (0, 1)]).to(anchors_NH.dtype)
        sums_SH, counts_S = summed_with_gradient(is_side_SN @ anchors_NH), summed_with_gradient(is_side_SN.sum(1))
        means_SH = sums_SH / counts_S.clamp(min=1)[:, None]
        shifted_NH = anchors_NH - means_SH[sides_N]
        if gradient_only:
            return anchors_NH.detach() + (shifted_NH - shifted_NH.detach())
        return length * nn.functional.normalize(shifted_NH, dim=-1)
