"""How much of a text the decoder reads from its anchor, on held-out pairs, and how alike anchors are.

Axes: N texts, H hidden size, P positions that have a target.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anchorembed.model.backbone import Backbone
from anchorembed.train.anchors import decoder_anchors
from anchorembed.train.reconstruction_batch import DIRECTIONS, MicroBatch, ReconstructionBatch
from anchorembed.train.stage import Metrics, read_back

_FIRST = 4  # target tokens of a text whose gain is reported by itself
_ALIKE = 0.95  # mean cosine of two anchors above which they have collapsed
_READ = 0.02  # nats a token: an anchor gain below it is noise


def anchor_gain(module: nn.Module, held_out: ReconstructionBatch, backbone: Backbone, bag_weight: float) -> Metrics:
    """Losses of held-out texts, in nats per token, and by how much the next text's anchor makes them higher.

    If ``bag_weight`` is above 0, the bag's loss and gain are measured, too.
    """
    batches = held_out.micro_batches
    anchors_NH = torch.cat([module(micro, encode_only=True)[0] for micro in batches])
    spread = _spread(anchors_NH)
    anchors_NH = torch.cat(decoder_anchors(held_out, anchors_NH, backbone)[0])
    losses, of_next = (_mean_losses(module, batches, each) for each in (anchors_NH, anchors_NH.roll(-1, 0)))
    gains = {name: of_next[name] - losses[name] for name in losses}
    metrics = {"held_out": losses["all"], "gain": gains["all"], "gain_first": gains["first"]} | spread
    return metrics | ({"held_out_bag": losses["bag"], "gain_bag": gains["bag"]} if bag_weight else {})


def _mean_losses(module: nn.Module, batches: Sequence[MicroBatch], anchors_NH: Tensor) -> Metrics:
    """Mean losses of target tokens, in nats: of all, of each text's first 4, and by the bag."""
    sums_5 = torch.zeros(5, device=anchors_NH.device)
    parts = anchors_NH.split([len(micro.sides_N) for micro in batches])
    for micro, anchors in zip(batches, parts, strict=True):
        _, (losses_P, bags_P, _), _ = module(micro, anchors)
        targets, positions = micro.targets, micro.targets.batch.positions
        anchors_P = positions[targets.slots][targets.owners]
        first_P = (positions[targets.predicting] < _FIRST + anchors_P).float()
        sums_5 += torch.stack([losses_P.sum(), first_P @ losses_P, bags_P.sum(), micro.weights_P.sum(), first_P.sum()])
    written, first, bag, tokens, first_tokens = sums_5.tolist()
    return {"all": written / tokens, "first": first / first_tokens, "bag": bag / tokens}


def _spread(anchors_NH: Tensor) -> Metrics:
    """Mean cosine of two anchors, and effective rank: e to the entropy of the spectrum (Roy and Vetterli, 2007)."""
    units_NH = nn.functional.normalize(anchors_NH, dim=-1)
    count = len(units_NH)
    cosine = (units_NH.sum(0).square().sum() - count) / (count * (count - 1))
    shares = nn.functional.normalize(torch.linalg.svdvals(units_NH), p=1, dim=0)
    return read_back({"cosine": cosine, "rank": torch.special.entr(shares).sum().exp()})


def collapsed(log: Sequence[Metrics]) -> str:
    """A warning if at the end of a log anchors are all alike and the decoder does not read them; else empty."""
    last = next((entry for entry in reversed(log) if "cosine_q2d" in entry), None)
    if last is None:
        return ""
    cosine, gain = (max(last[f"{name}_{direction}"] for direction in DIRECTIONS) for name in ("cosine", "gain"))
    if cosine <= _ALIKE or gain >= _READ:
        return ""
    return (
        f"anchors are nearly alike (mean cosine {cosine:.2f}) and the decoder reads nothing from them "
        f"(anchor gain {gain:.3f} nats a token). Stage II is likely better from the base model: reconstruct=null."
    )
