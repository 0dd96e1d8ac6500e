"""CPU kernels for the two operators of torch's varlen attention, which has them for GPUs alone.

They take what torch hands to the kernel, so that everything around it is tested: scales, windows, grouped heads, the
compiler, and what a step does while a GPU computes.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from anchorembed.model import attention

Sides = tuple[Tensor, Tensor, Tensor]


def _apart(q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> Sides:
    """Queries, keys and values of one text in float32, [A, L, D], as many keys as queries."""
    groups = q.shape[1] // k.shape[1]
    wide = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    queries, keys, values = (side[first:last].transpose(0, 1).float() for side in wide)
    return queries, keys, values


def _shares(queries: Tensor, keys: Tensor, scale: float, window: list[int] | None) -> Tensor:
    """How much each query takes of each value, [A, L, L]."""
    behind, ahead = window or [-1, 0]
    assert ahead == 0, "causal"
    allowed = attention._allowed(queries.shape[1], None if behind == -1 else behind + 1, queries.device)
    return (queries @ keys.transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf).softmax(-1)


def _forward(  # noqa: PLR0913, PLR0917 - as torch has it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *rest: Any,
) -> Sides:
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert cu_seq_q.dtype == torch.int32
    parts = []
    for first, last in pairwise(cu_seq_q.tolist()):
        queries, keys, values = _apart(query, key, value, first, last)
        shares = _shares(queries, keys, scale or query.shape[-1] ** -0.5, window_size)
        parts.append((shares @ values).transpose(0, 1))
    mixed = torch.cat(parts).to(query.dtype)
    return mixed, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _backward(  # noqa: PLR0913, PLR0917 - as torch has it
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *rest: Any,
) -> Sides:
    factor = scale or query.shape[-1] ** -0.5
    parts = []
    for first, last in pairwise(cu_seq_q.tolist()):
        queries, keys, values = _apart(query, key, value, first, last)
        slopes = grad_out[first:last].transpose(0, 1).float()
        shares = _shares(queries, keys, factor, window_size)
        into = slopes @ values.transpose(1, 2)
        of_scores = factor * shares * (into - (into * shares).sum(-1, keepdim=True))
        of_sides = (of_scores @ keys, of_scores.transpose(1, 2) @ queries, shares.transpose(1, 2) @ slopes)
        parts.append([side.transpose(0, 1) for side in of_sides])
    wide_q, wide_k, wide_v = (torch.cat(side) for side in zip(*parts, strict=True))
    narrow_k, narrow_v = (side.unflatten(1, (key.shape[1], -1)).sum(2) for side in (wide_k, wide_v))
    return wide_q.to(query.dtype), narrow_k.to(key.dtype), narrow_v.to(value.dtype)


@functools.cache
def varlen_on_the_cpu() -> None:
    """Register them."""
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)
