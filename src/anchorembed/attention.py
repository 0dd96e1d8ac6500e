"""Causal attention within packed sequences, for any decoder of transformers, through its attention registry.

What each attention module asks for (scale, sliding window, soft-cap) is remembered, for code that runs it otherwise.

Axes: T packed tokens, A heads, D head size, B sequences in a bucket, L its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from anchorembed.errors import InputError
from anchorembed.kernels import into_buckets, out_of_buckets
from anchorembed.packing import Bucket

ATTENTION = "anchorembed_packed"
SHORT = 512  # tokens up to which attention is faster spelt out on the CPU


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a module asks of attention beyond causality."""

    scale: float | None
    window: int | None
    softcap: float | None


_options: "WeakKeyDictionary[nn.Module, AttentionOptions]" = WeakKeyDictionary()


def options_of(module: nn.Module) -> AttentionOptions | None:
    """What an attention module asked for when it last ran packed; None if it never did."""
    return _options.get(module)


def packed_attention(  # noqa: PLR0913, PLR0917 - the signature is that of transformers' attention registry
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Sequence[Bucket] | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence.

    ``query`` is [1, A, T, D], ``key`` and ``value`` may have fewer heads; the result is [1, T, A, D].
    """
    if packing is None:
        raise InputError(f"{type(module).__name__}: this model does not hand on what packed attention needs.")
    if unknown.get("s_aux") is not None or unknown.get("position_bias") is not None:
        raise InputError(f"{type(module).__name__}: attention sinks and position biases are not supported.")
    _options[module] = AttentionOptions(scaling, sliding_window, softcap)
    queries, keys, values = (side[0].transpose(0, 1) for side in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in into_buckets(queries, keys, values, None, packing):
        k_all, v_all = (side.repeat_interleave(groups, 1) if groups > 1 else side for side in (k, v))
        outputs.append(_causal(q, k_all, v_all, scaling, dropout, sliding_window, softcap))
    return out_of_buckets(packing, outputs)[None], None


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of [B, A, L, D], spelt out where no kernel does what is wanted, or does it slower."""
    length = q.shape[2]
    window = window if window is not None and window < length else None
    spelt_out = softcap is not None or (q.device.type == "cpu" and length <= SHORT)
    if not spelt_out and window is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    allowed_LL = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        allowed_LL = allowed_LL.triu(1 - window)
    if not spelt_out:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_LL, dropout_p=dropout, scale=scaling)
    scores = (q @ k.transpose(2, 3)).float() * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return F.dropout(scores.masked_fill(~allowed_LL, float("-inf")).softmax(-1).to(v.dtype), dropout) @ v


AttentionInterface.register(ATTENTION, packed_attention)
