"""Causal attention within packed sequences, for any decoder of transformers, through its attention registry.

Two ways to the same result:

- *varlen*: torch's kernel for packed sequences (``varlen_attn``), on a GPU in bfloat16 or float16;
- *bucketed*: sequences of like length side by side, spelt out as matrix products. It runs everywhere and knows
  soft-caps. To the compiler it is one opaque operator.

Axes: T packed tokens, A heads, K key heads, D head size, B sequences in a bucket, L its length, G = A / K,
N = B * K, R = G * L query rows that share a key head.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from anchorembed.errors import InputError
from anchorembed.model.packing import Bucket, lay_out, send

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError as error:
    raise InputError(f"torch {torch.__version__} is too old. Install torch 2.11 or newer.") from error

ATTENTION = "anchorembed_packed"
LARGEST_HEAD = 256  # of varlen_attn
_SCORES_AT_ONCE = 2**21  # of bucketed attention: 4 MB in bfloat16, which stay in a CPU's cache
_GROUPED: Any = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)  # torch 2.11: none


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
    ends: Tensor | None = None,
    longest: int = 0,
    offsets: Tensor | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence.

    ``query`` is [1, A, T, D], ``key`` and ``value`` may have fewer heads; the result is [1, T, A, D]. With ``ends`` and
    ``longest`` the varlen kernel runs, with ``offsets`` (on the CPU) the bucketed operator.
    """
    if unknown.get("s_aux") is not None or unknown.get("position_bias") is not None:
        raise InputError(f"{type(module).__name__}: attention sinks and position biases are not supported.")
    q, k, v = (side[0].transpose(0, 1).to(value.dtype) for side in (query, key, value))
    if ends is not None:
        if dropout or softcap is not None:
            raise InputError(f"{type(module).__name__}: varlen attention has neither dropout nor soft-caps.")
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        by_kernel: Any = varlen_attn
        mixed: Tensor = by_kernel(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **_GROUPED)
        return mixed[None], None
    if offsets is None:
        raise InputError(f"{type(module).__name__}: this model does not hand on what packed attention needs.")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout:
        return _with_dropout(q, k, v, offsets, scale, dropout, sliding_window, softcap)[None], None
    mixed, _ = _bucketed(q, k, v, offsets, scale, sliding_window, softcap)
    return mixed[None], None


AttentionInterface.register(ATTENTION, packed_attention)


# --- The bucketed operator -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _layout(offsets: bytes, device: torch.device) -> tuple[Bucket, ...]:
    """Buckets of a batch, laid out once for all layers."""
    laid = lay_out(torch.frombuffer(bytearray(offsets), dtype=torch.long))
    return tuple(Bucket(*(send(part, device) for part in (b.index, b.real, b.tokens, b.slots))) for b in laid)


def _buckets(offsets: Tensor, device: torch.device) -> tuple[Bucket, ...]:
    return _layout(offsets.numpy().tobytes(), device)


@torch.library.custom_op("anchorembed::bucketed_attention", mutates_args=())
def _bucketed(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention [T, A, D], and the log of each row's softmax sum, [T, A] in float32, for its backward."""
    mixed_TAD, sums_TA = torch.empty_like(q_TAD), q_TAD.new_empty(q_TAD.shape[:2], dtype=torch.float32)
    for bucket in _buckets(offsets, q_TAD.device):
        queries, keys, values = (_side_by_side(side, bucket, k_TKD.shape[1]) for side in (q_TAD, k_TKD, v_TKD))
        mixed = torch.empty_like(queries)
        sums = queries.new_empty(queries.shape[:2], dtype=torch.float32)
        for part in _blocks(len(queries), queries.shape[1] * keys.shape[1]):
            scores = _scores(queries[part], keys[part], scale, window, softcap)
            sums[part] = scores.logsumexp(-1)
            torch.bmm(scores.sub_(sums[part, :, None]).exp_().to(values.dtype), values[part], out=mixed[part])
        mixed_TAD.index_copy_(0, bucket.tokens, _end_to_end(mixed, bucket, q_TAD.shape[1]))
        sums_TA.index_copy_(0, bucket.tokens, _end_to_end(sums[..., None], bucket, q_TAD.shape[1])[..., 0])
    return mixed_TAD, sums_TA


@_bucketed.register_fake
def _(q_TAD: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_TAD), q_TAD.new_empty(q_TAD.shape[:2], dtype=torch.float32)


@torch.library.custom_op("anchorembed::bucketed_attention_backward", mutates_args=())
def _bucketed_backward(  # noqa: PLR0913, PLR0917 - an operator takes tensors and numbers, no object
    slope_TAD: Tensor,
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    mixed_TAD: Tensor,
    sums_TA: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; probabilities are computed again from the rows' sums."""
    into_q, into_k, into_v = (torch.empty_like(side) for side in (q_TAD, k_TKD, v_TKD))
    inner_TA = (slope_TAD.float() * mixed_TAD.float()).sum(-1)  # each row's sum of probability times its gradient
    heads, key_heads = q_TAD.shape[1], k_TKD.shape[1]
    for bucket in _buckets(offsets, q_TAD.device):
        queries, keys, values = (_side_by_side(side, bucket, key_heads) for side in (q_TAD, k_TKD, v_TKD))
        slopes = _side_by_side(slope_TAD, bucket, key_heads, padding=0.0)
        inner = _side_by_side(inner_TA[..., None], bucket, key_heads, padding=0.0)
        # a padded row has no sum of its own: with another's, its probabilities could overflow
        sums = _side_by_side(sums_TA[..., None], bucket, key_heads, padding=float("inf"))
        of_q, of_k, of_v = (torch.empty_like(side) for side in (queries, keys, values))
        for part in _blocks(len(queries), queries.shape[1] * keys.shape[1]):
            scores = _scores(queries[part], keys[part], scale, window, softcap)
            curve = None if softcap is None else 1 - (scores / softcap).nan_to_num_(neginf=0.0).square_()
            shares = scores.sub_(sums[part]).exp_()
            torch.bmm(shares.to(slopes.dtype).transpose(1, 2), slopes[part], out=of_v[part])
            into = (slopes[part] @ values[part].transpose(1, 2)).float().sub_(inner[part]).mul_(shares).mul_(scale)
            into = (into if curve is None else into.mul_(curve)).to(keys.dtype)
            torch.bmm(into, keys[part], out=of_q[part])
            torch.bmm(into.transpose(1, 2), queries[part], out=of_k[part])
        for whole, one, count in ((into_q, of_q, heads), (into_k, of_k, key_heads), (into_v, of_v, key_heads)):
            whole.index_copy_(0, bucket.tokens, _end_to_end(one, bucket, count))
    return into_q, into_k, into_v


@_bucketed_backward.register_fake
def _(slope_TAD: Tensor, q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_TAD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - as torch calls it
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, slope_TAD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    *tensors, offsets = ctx.saved_tensors
    return (*_bucketed_backward(slope_TAD, *tensors, offsets, *ctx.options), None, None, None, None)


_bucketed.register_autograd(_differentiate, setup_context=_keep)


def _side_by_side(x_TAD: Tensor, bucket: Bucket, key_heads: int, padding: float | None = None) -> Tensor:
    """Rows of a bucket, [N, R, D]: query heads that share a key head are rows of one product.

    What is padding has the values of its text's first token, or ``padding``.
    """
    x_BLAD = x_TAD[bucket.index]
    if padding is not None:
        x_BLAD = x_BLAD.masked_fill(~bucket.real[:, :, None, None], padding)
    x_BKGLD: Tensor = x_BLAD.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    return x_BKGLD.flatten(2, 3).flatten(0, 1)


def _end_to_end(x_NRD: Tensor, bucket: Bucket, heads: int) -> Tensor:
    """The bucket's real rows again, [tokens, A, D]."""
    texts, length = bucket.index.shape
    x_BALD = x_NRD.view(texts, heads, length, -1)
    return x_BALD.transpose(1, 2).flatten(0, 1)[bucket.slots]


def _blocks(heads: int, scores: int) -> Iterator[slice]:
    """Heads a few at a time, evenly, so that their scores stay in the cache from one product to the next."""
    count = min(heads, -(-heads * scores // _SCORES_AT_ONCE))
    for number in range(count):
        yield slice(heads * number // count, heads * (number + 1) // count)


def _scores(queries_NRD: Tensor, keys_NLD: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Scaled and capped scores [N, R, L] in float32, minus infinity where a query must not look."""
    scores = (queries_NRD @ keys_NLD.transpose(1, 2)).float().mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    length = scores.shape[2]
    by_query = scores.view(len(scores), -1, length, length)
    by_query.masked_fill_(~_allowed(length, window, scores.device), float("-inf"))
    return scores


def _allowed(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query may look at, [L, L]: itself and those before it, at most ``window`` in all."""
    allowed_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed_LL if window is None else allowed_LL.triu(1 - window)


def _with_dropout(
    q_TAD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    offsets: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The same, text by text by autograd, for the few models that drop attention's probabilities as they train."""
    groups, lengths = q_TAD.shape[1] // k_TKD.shape[1], offsets.diff().tolist()
    wide = (q_TAD, k_TKD.repeat_interleave(groups, 1), v_TKD.repeat_interleave(groups, 1))
    mixed = []
    for q, k, v in zip(*(side.transpose(0, 1).split(lengths, 1) for side in wide), strict=True):
        scores = (q @ k.transpose(1, 2)).float() * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_allowed(q.shape[1], window, q.device), float("-inf"))
        mixed.append(F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v)
    return torch.cat(mixed, 1).transpose(0, 1)
