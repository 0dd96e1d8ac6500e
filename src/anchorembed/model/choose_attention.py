"""Choose the attention of a model on a GPU: the varlen kernel, or buckets."""

import logging

import torch

from anchorembed.errors import InputError, first_line
from anchorembed.model.attention import LARGEST_HEAD
from anchorembed.model.backbone import Backbone
from anchorembed.model.check_packed_loss import probe_batch
from anchorembed.system.device import autocast

_log = logging.getLogger(__name__)
_LARGEST_DIFFERENCE = 0.03  # relative, in bfloat16, between states by the varlen kernel and by buckets


def use_varlen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Use the varlen kernel on a GPU if the model allows it and the kernel agrees with bucketed attention.

    It needs compute capability 8.0, products in bfloat16, heads of at most 256, and neither soft-caps nor dropout in
    attention. Otherwise attention stays in buckets, and a warning says why.
    """
    if backbone.device.type != "cuda" or dtype == torch.float32:
        return
    reason = _unsupported(backbone) or _failure(backbone, dtype)
    backbone.varlen = not reason
    if reason:
        _log.warning("%s: attention by buckets, slower: %s.", backbone.name, reason)


def _unsupported(backbone: Backbone) -> str:
    """Why a model on a GPU cannot use the varlen kernel; empty if it can."""
    config = backbone.model.config
    if torch.cuda.get_device_capability(backbone.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft-cap"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads of {head} are above {LARGEST_HEAD}" if head > LARGEST_HEAD else ""


@torch.no_grad()
def _failure(backbone: Backbone, dtype: torch.dtype) -> str:
    """The varlen kernel's error on a probe, or by how much its states differ from bucketed attention's; else empty."""
    batch = probe_batch(backbone)
    with autocast(backbone.device, dtype):
        vectors_TH = backbone.embed(batch.tokens)
        expected_TH = backbone.states(vectors_TH, batch, varlen=False).float()
        try:
            states_TH = backbone.states(vectors_TH, batch, varlen=True).float()
        except (RuntimeError, InputError) as error:
            return f"the varlen kernel fails: {first_line(error)}"
    difference = float((states_TH - expected_TH).norm() / expected_TH.norm())
    return "" if difference <= _LARGEST_DIFFERENCE else f"the varlen kernel's states differ by {difference:.3f}"
