"""Element-wise work fused: norms, rotary positions, SwiGLU, softmax, dropout, each with a backward that saves little.

Each is a plain function of tensors. Where there is a C++ compiler (or a GPU) and the input is worth it, it runs
compiled, in one pass over memory; elsewhere the same function runs as it stands. Sums and exponentials are float32.

Axes: T packed tokens, H hidden size, F feed-forward size, A heads, D head size, B sequences in a bucket, L its length.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from anchorembed.packing import Bucket

Context = Any  # torch gives autograd contexts no type that has what they have

Value = Tensor | torch.dtype
_P = ParamSpec("_P")
_R = TypeVar("_R")
_WORTH_COMPILING = 2**17  # elements of the first argument; below, a few small operations cost less
_SCORES_AT_ONCE = 2**21  # of attention: 4 MB in bfloat16
_HASH = (0x7FEB352D, 0x046CA68B)  # odd multipliers of the integer hash behind dropout


# --- Compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use on the CPU; None, said once, if there is none."""
    found = next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )
    if found is None:
        warnings.warn("No C++ compiler (g++, clang++ or $CXX): training runs, but slower.", stacklevel=2)
    return found


def fused(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function of tensors compiled where that pays: large input, and a compiler at hand."""

    @functools.cache
    def compiled() -> Callable[_P, _R]:  # not before it is needed: the compiler takes a second to import
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        large = isinstance(first, Tensor) and first.numel() >= _WORTH_COMPILING
        if large and compiler() is not None:
            return compiled()(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def _apply(function: type[torch.autograd.Function], *inputs: object) -> Any:  # noqa: ANN401 - as torch leaves it
    return function.apply(*inputs)


# --- Weights in the dtype of matrix products -------------------------------------------------------------------------

_Copies = dict[Hashable, tuple[Tensor, Tensor]]  # a weight's place -> the weight and its copy
_copies: ContextVar[_Copies | None] = ContextVar("_copies", default=None)


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """Promise that no weight changes within: each is cast once there, rather than once a use."""
    if _copies.get() is not None:
        yield
        return
    token = _copies.set({})
    try:
        yield
    finally:
        _copies.reset(token)


def low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``weight`` in ``dtype``, detached."""
    return _low(weight, dtype, _copies.get())


def _low(weight: Tensor, dtype: torch.dtype, copies: _Copies | None) -> Tensor:
    if weight.dtype == dtype:
        return weight.detach()
    place = _place(weight)  # not its id: autograd may hand back another object for the same weight
    known = copies.get(place) if copies is not None else None
    if known is not None and known[1].dtype == dtype:
        return known[1]
    copy = weight.detach().to(dtype)
    if copies is not None:
        copies[place] = (weight.detach(), copy)  # the weight, too: nothing else can take its place while this lives
    return copy


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    """What tells tensors that are alive apart."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


# --- Gradients as large as a vocabulary ------------------------------------------------------------------------------

_in_place: ContextVar[bool] = ContextVar("_in_place", default=False)


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Within it, embedding and head add to their weight's ``grad`` directly: no second array as large as a vocabulary.

    The loss must be backpropagated as it is, once: with a factor the head's backward refuses it.
    """
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """Return the ``grad`` of a trained weight to add to in place, or None where autograd is to sum gradients."""
    if not (_in_place.get() and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled()):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, weight_VH: Tensor, tokens_T: Tensor, total_VH: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.total, ctx.shape = total_VH, weight_VH.shape
        return weight_VH[tokens_T]

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, None, None]:
        (tokens_T,) = ctx.saved_tensors
        if ctx.total is not None:
            ctx.total.index_add_(0, tokens_T, slopes[0])
            return None, None, None
        return slopes[0].new_zeros(ctx.shape).index_add_(0, tokens_T, slopes[0]), None, None


def lookup(weight_VH: Tensor, tokens_T: Tensor) -> Tensor:
    """Rows of an embedding, [T, H]; every row learns, as nothing is padding here."""
    result: Tensor = _apply(_Lookup, weight_VH, tokens_T, gradient_to_add_to(weight_VH))
    return result


# --- Linear modules --------------------------------------------------------------------------------------------------


class _Products(torch.autograd.Function):
    """Products of one input with several weights, whose input gradient is summed in place."""

    @staticmethod
    def forward(ctx: Context, x_TH: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TH if any(ctx.needs_input_grad[1:]) else None, *weights)
        ctx.known = _copies.get()  # backward may run in another thread
        return tuple(x_TH @ low(weight, x_TH.dtype).T for weight in weights)

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, *weights = ctx.saved_tensors  # weights themselves: sharded ones are gathered anew, and cast anew
        need_x, *need_weights = ctx.needs_input_grad
        total: Tensor | None = None
        gradients: list[Tensor | None] = []
        for slope, weight, needed in zip(slopes, weights, need_weights, strict=True):
            if need_x:
                copy = _low(weight, slope.dtype, ctx.known)
                total = slope @ copy if total is None else total.addmm_(slope, copy)
            gradients.append((slope.T @ x_TH).to(weight.dtype) if needed else None)
        return (total, *gradients)


def products(x_TH: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``x @ weight.T`` for each weight, in x's dtype: [T, out] each."""
    result: tuple[Tensor, ...] = _apply(_Products, x_TH, *weights)
    return result


# --- Norms -----------------------------------------------------------------------------------------------------------


@fused
def _norm_forward(h_TH: Tensor, scale_H: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h = h_TH.float()
    rate = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return (h * rate * scale_H).to(dtype), rate


@fused
def _add_norm_forward(
    h_TH: Tensor, delta_TH: Tensor, scale_H: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h = h_TH.float() + delta_TH.float()
    rate = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return h.to(h_TH.dtype), (h * rate * scale_H).to(dtype), rate


@fused
def _renormed(h_TH: Tensor, rate_T1: Tensor, scale_H: Tensor, dtype: torch.dtype) -> Tensor:
    return (h_TH.float() * rate_T1 * scale_H).to(dtype)


@fused
def _norm_backward(slope_TH: Tensor, h_TH: Tensor, rate_T1: Tensor, scale_H: Tensor) -> tuple[Tensor, Tensor]:
    slope, unit = slope_TH.float(), h_TH.float() * rate_T1
    scaled = slope * scale_H
    into = rate_T1 * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return into.to(h_TH.dtype), (slope * unit).sum(0)


@fused
def _add_norm_backward(
    slope_TH: Tensor, onward_TH: Tensor, h_TH: Tensor, rate_T1: Tensor, scale_H: Tensor, low_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    slope, unit = slope_TH.float(), h_TH.float() * rate_T1
    scaled = slope * scale_H
    into = onward_TH.float() + rate_T1 * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return into.to(h_TH.dtype), into.to(low_dtype), (slope * unit).sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, h_TH: Tensor, weight_H: Tensor, offset: float, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        normed, rate = _norm_forward(h_TH, weight_H.float() + offset, epsilon, dtype)
        ctx.save_for_backward(h_TH, rate, weight_H)
        ctx.offset = offset
        ctx.mark_non_differentiable(rate)
        return normed, rate

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        h_TH, rate, weight_H = ctx.saved_tensors
        into, scale = _norm_backward(slopes[0], h_TH, rate, weight_H.float() + ctx.offset)
        return into, scale.to(weight_H.dtype) if ctx.needs_input_grad[1] else None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        h_TH: Tensor,
        delta_TH: Tensor,
        weight_H: Tensor,
        offset: float,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        after, normed, rate = _add_norm_forward(h_TH, delta_TH, weight_H.float() + offset, epsilon, dtype)
        ctx.save_for_backward(after, rate, weight_H)
        ctx.offset, ctx.low_dtype = offset, delta_TH.dtype
        ctx.mark_non_differentiable(rate)
        return after, normed, rate

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        after, rate, weight_H = ctx.saved_tensors
        scale_H = weight_H.float() + ctx.offset
        into, lowered, scale = _add_norm_backward(slopes[1], slopes[0], after, rate, scale_H, ctx.low_dtype)
        return into, lowered, scale.to(weight_H.dtype) if ctx.needs_input_grad[2] else None, None, None, None


class Recomputed:
    """Within it, autograd saves what makes ``tensor`` again rather than ``tensor`` itself."""

    def __init__(self, tensor: Tensor, again: Callable[..., Tensor], *inputs: Value) -> None:
        made_of = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
        place = _place(tensor)  # not the tensor: autograd keeps both hooks, and with them what they refer to
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda saved: None if _place(saved) == place else saved,
            lambda packed: again(*made_of) if packed is None else packed,
        )

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *what: object) -> None:
        self._hooks.__exit__(*what)


def norm(
    h_TH: Tensor, weight_H: Tensor, offset: float, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Recomputed]:
    """RMSNorm (Zhang and Sennrich, 2019) by ``weight + offset``, and what recomputes it in backward."""
    normed, rate = _apply(_Norm, h_TH, weight_H, offset, epsilon, dtype)
    return normed, Recomputed(normed, _renormed, h_TH, rate, weight_H.detach().float() + offset, dtype)


def add_norm(
    h_TH: Tensor, delta_TH: Tensor, weight_H: Tensor, offset: float, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Recomputed]:
    """``h + delta``, its RMSNorm, and what recomputes that in backward."""
    after, normed, rate = _apply(_AddNorm, h_TH, delta_TH, weight_H, offset, epsilon, dtype)
    return after, normed, Recomputed(normed, _renormed, after, rate, weight_H.detach().float() + offset, dtype)


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


@fused
def _swiglu_forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    gate = gate_TF.float()
    return (gate * torch.sigmoid(gate) * up_TF.float()).to(gate_TF.dtype)


@fused
def _swiglu_backward(slope_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    slope, gate, share = slope_TF.float(), gate_TF.float(), torch.sigmoid(gate_TF.float())
    into_gate = slope * up_TF.float() * share * (1 + gate * (1 - share))
    return into_gate.to(gate_TF.dtype), (slope * gate * share).to(gate_TF.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return _swiglu_forward(gate_TF, up_TF)

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        return _swiglu_backward(slopes[0], *ctx.saved_tensors)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Recomputed]:
    """``silu(gate) * up`` (Shazeer, 2020), and what recomputes it in backward."""
    result: Tensor = _apply(_Swiglu, gate_TF, up_TF)
    return result, Recomputed(result, _swiglu_forward, gate_TF, up_TF)


# --- Rotary positions, on the way into buckets of sequences side by side ---------------------------------------------


def _turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


@fused
def _into_bucket(x_TAD: Tensor, index_BL: Tensor) -> Tensor:
    return x_TAD[index_BL].transpose(1, 2).contiguous()


@fused
def _rotated_into_bucket(x_TAD: Tensor, index_BL: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    x = x_TAD[index_BL].float()
    rotated = x * cos_TD[index_BL][:, :, None] + _turn(x) * sin_TD[index_BL][:, :, None]
    return rotated.to(x_TAD.dtype).transpose(1, 2).contiguous()


@fused
def _out_of_bucket(x_BALD: Tensor, slots_R: Tensor) -> Tensor:
    length = x_BALD.shape[2]
    return x_BALD[slots_R // length, :, slots_R % length]


@fused
def _rotated_out_of_bucket(x_BALD: Tensor, slots_R: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
    length = x_BALD.shape[2]
    x = x_BALD[slots_R // length, :, slots_R % length].float()
    return (x * cos_RD[:, None] - _turn(x * sin_RD[:, None])).to(x_BALD.dtype)


# --- Dropout that saves nothing --------------------------------------------------------------------------------------


@fused
def _dropped(x: Tensor, seed: int, rate: float) -> Tensor:
    """Zero a share ``rate`` of x by a hash of each element's place: the same seed drops the same again."""
    place = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) ^ seed
    for multiplier in _HASH:  # multiply and shift, as integer hashes do; products wrap around
        place = (place ^ ((place >> 16) & 0xFFFF)) * multiplier
    place ^= (place >> 16) & 0xFFFF
    keep = (place & 0xFFFFFF) >= int(rate * 2**24)
    return torch.where(keep, x * (1 / (1 - rate)), 0.0).to(x.dtype)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_TH: Tensor, down_RH: Tensor, rate: float, seed: int) -> Tensor:
        ctx.save_for_backward(x_TH, down_RH)
        ctx.rate, ctx.seed = rate, seed
        return (_dropped(x_TH, seed, rate) if rate else x_TH) @ down_RH.to(x_TH.dtype).T

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, down_RH = ctx.saved_tensors
        dropped = _dropped(x_TH, ctx.seed, ctx.rate) if ctx.rate else x_TH
        into = slopes[0] @ down_RH.to(x_TH.dtype) if ctx.needs_input_grad[0] else None
        if into is not None and ctx.rate:
            into = _dropped(into, ctx.seed, ctx.rate)
        return into, (slopes[0].T @ dropped).to(down_RH.dtype), None, None


def low_rank(x_TH: Tensor, down_RH: Tensor, rate: float) -> Tensor:
    """Dropout, then the product with LoRA's A: [T, R]. The mask is drawn from torch's seed and never stored."""
    seed = int(torch.randint(2**31 - 1, ())) if rate else 0
    result: Tensor = _apply(_LowRank, x_TH, down_RH, rate, seed)
    return result


# --- Attention within a bucket ---------------------------------------------------------------------------------------


@fused
def _probabilities(scores_NRL: Tensor, scale: float, window: int) -> Tensor:
    length = scores_NRL.shape[-1]
    column = torch.arange(length, device=scores_NRL.device)
    row = (torch.arange(scores_NRL.shape[1], device=scores_NRL.device) % length)[:, None]
    allowed = (column <= row) & (row - column < window)
    return torch.where(allowed, scores_NRL.float() * scale, float("-inf")).softmax(-1).to(scores_NRL.dtype)


@fused
def _scores_backward(slope_NRL: Tensor, probabilities_NRL: Tensor, scale: float) -> Tensor:
    slope, share = slope_NRL.float(), probabilities_NRL.float()
    return (share * (slope - (share * slope).sum(-1, keepdim=True)) * scale).to(slope_NRL.dtype)


def _blocks(heads: int, scores: int) -> Iterator[slice]:
    """Heads a few at a time, evenly, so that their scores stay in the cache from one product to the next."""
    count = min(heads, -(-heads * scores // _SCORES_AT_ONCE))
    for number in range(count):
        yield slice(heads * number // count, heads * (number + 1) // count)


class _ShortAttention(torch.autograd.Function):
    """Attention with its probabilities kept, which is what its backward is fastest with where sequences are short."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        heads = k.shape[0] * k.shape[1]  # query heads that share a key head are rows of one product
        rows, keys, values = q.view(heads, -1, q.shape[-1]), k.flatten(0, 1), v.flatten(0, 1)
        result = torch.empty_like(rows)
        share = rows.new_empty(heads, rows.shape[1], keys.shape[1]) if any(ctx.needs_input_grad) else None
        for part in _blocks(heads, rows.shape[1] * keys.shape[1]):
            probabilities = _probabilities(rows[part] @ keys[part].transpose(1, 2), scale, window)
            torch.bmm(probabilities, values[part], out=result[part])
            if share is not None:
                share[part] = probabilities
        ctx.save_for_backward(rows, keys, values, share)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape)
        return result.view(q.shape)

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, share = ctx.saved_tensors
        slope = slopes[0].contiguous().view(rows.shape)
        into_rows, into_keys, into_values = (torch.empty_like(side) for side in (rows, keys, values))
        for part in _blocks(len(share), share[0].numel()):
            into = _scores_backward(slope[part] @ values[part].transpose(1, 2), share[part], ctx.scale)
            torch.bmm(into, keys[part], out=into_rows[part])
            torch.bmm(into.transpose(1, 2), rows[part], out=into_keys[part])
            torch.bmm(share[part].transpose(1, 2), slope[part], out=into_values[part])
        of_queries, of_keys = ctx.shapes
        return into_rows.view(of_queries), into_keys.view(of_keys), into_values.view(of_keys), None, None


def short_attention(q_BALD: Tensor, k_BALD: Tensor, v_BALD: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention [B, A, L, D]; ``k`` and ``v`` may have fewer heads; a row sees ``window`` columns at most."""
    result: Tensor = _apply(_ShortAttention, q_BALD, k_BALD, v_BALD, scale, window or 2**31 - 1)
    return result


class _IntoBuckets(torch.autograd.Function):
    """Lay queries, keys and values side by side, the first two rotated, in one pass each."""

    @staticmethod
    def forward(
        ctx: Context,
        q_TAD: Tensor,
        k_TAD: Tensor,
        v_TAD: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        buckets: Sequence[Bucket],
    ) -> tuple[Tensor, ...]:
        ctx.angles = angles
        ctx.buckets, ctx.shapes = buckets, (q_TAD.shape, k_TAD.shape, v_TAD.shape)
        laid = []
        for bucket in buckets:
            for x_TAD in (q_TAD, k_TAD):
                laid.append(
                    _rotated_into_bucket(x_TAD, bucket.index, *angles) if angles else _into_bucket(x_TAD, bucket.index)
                )
            laid.append(_into_bucket(v_TAD, bucket.index))
        return tuple(laid)

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        results = [slope.new_empty(shape) for slope, shape in zip(slopes, ctx.shapes, strict=False)]
        for number, bucket in enumerate(ctx.buckets):
            angles = [angle_TD[bucket.tokens] for angle_TD in ctx.angles or ()]
            for side, result in enumerate(results):
                slope, rotated = slopes[3 * number + side], side < 2 and angles
                out = (
                    _rotated_out_of_bucket(slope, bucket.slots, *angles)
                    if rotated
                    else _out_of_bucket(slope, bucket.slots)
                )
                result.index_copy_(0, bucket.tokens, out)
        return (*results, None, None)


class _OutOfBuckets(torch.autograd.Function):
    """Lay the results end to end again; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Context, buckets: Sequence[Bucket], *outputs: Tensor) -> Tensor:
        ctx.buckets = buckets
        count = sum(len(bucket.tokens) for bucket in buckets)
        packed_TAD = outputs[0].new_empty(count, outputs[0].shape[1], outputs[0].shape[3])
        for bucket, output in zip(buckets, outputs, strict=True):
            packed_TAD.index_copy_(0, bucket.tokens, _out_of_bucket(output, bucket.slots))
        return packed_TAD

    @staticmethod
    def backward(ctx: Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        laid = (_into_bucket(slopes[0], bucket.index) * bucket.real[:, None, :, None] for bucket in ctx.buckets)
        return (None, *laid)


def into_buckets(
    q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, angles: tuple[Tensor, Tensor] | None, buckets: Sequence[Bucket]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values [B, A, L, D] of each bucket.

    With ``angles``, cosines and sines [T, D], queries and keys are rotated to their positions.
    """
    laid = _apply(_IntoBuckets, q_TAD, k_TAD, v_TAD, angles, buckets)
    return [(laid[start], laid[start + 1], laid[start + 2]) for start in range(0, len(laid), 3)]


def out_of_buckets(buckets: Sequence[Bucket], outputs: Sequence[Tensor]) -> Tensor:
    """Packed rows [T, A, D] of the buckets' results [B, A, L, D]."""
    result: Tensor = _apply(_OutOfBuckets, buckets, *outputs)
    return result
