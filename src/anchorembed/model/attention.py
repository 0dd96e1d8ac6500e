"""Causal attention within packed sequences, for any decoder of transformers, through its attention registry.

There are two implementations with the same result:

- *varlen*: torch's kernel for packed sequences (``varlen_attn``), on a GPU in bfloat16 or float16;
- *bucketed*: sequences of like length side by side, as matrix products. It runs everywhere and supports soft-caps. To
  the compiler it is one opaque operator.

Axes: T packed tokens, A heads, K key heads, D head size, B sequences in a bucket, L tokens of its longest, G = A / K,
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
LARGEST_HEAD = 256  # D that varlen_attn supports
_SCORES_AT_ONCE = 2**21  # in bucketed attention: 4 MB in bfloat16, which stay in a CPU's cache
# varlen_attn of torch 2.11 always groups heads and lacks the option
_GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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
    """Causal attention within each packed sequence, called by transformers' layers.

    ``query`` is [1, A, T, D], ``key`` and ``value`` are [1, K, T, D]; the result is [1, T, A, D]. With ``ends`` and
    ``longest`` the varlen kernel runs, with ``offsets`` (on the CPU) the bucketed operator.

    Raises:
        InputError: if a model needs what neither implementation supports, or does not pass on the batch's layout.
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
        raise InputError(f"{type(module).__name__}: this model does not pass on the arguments of packed attention.")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout:
        return _with_dropout(q, k, v, offsets, scale, dropout, sliding_window, softcap)[None], None
    mixed, _ = _bucketed(q, k, v, offsets, scale, sliding_window, softcap)
    return mixed[None], None


AttentionInterface.register(ATTENTION, packed_attention)


# --- The bucketed operator -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _buckets(offsets: bytes, device: torch.device) -> tuple[Bucket, ...]:
    """Buckets of a batch on a device, laid out for its first layer and cached for the others."""
    buckets = lay_out(torch.frombuffer(bytearray(offsets), dtype=torch.long))
    return tuple(Bucket(*(send(part, device) for part in (b.index, b.real, b.tokens, b.slots))) for b in buckets)


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
    """Attention [T, A, D], and for the backward pass the log of each row's softmax sum, [T, A] in float32."""
    mixed_TAD, sums_TA = torch.empty_like(q_TAD), q_TAD.new_empty(q_TAD.shape[:2], dtype=torch.float32)
    for bucket in _buckets(offsets.numpy().tobytes(), q_TAD.device):
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
    gradient_TAD: Tensor,
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
    """Gradients of queries, keys and values; probabilities are recomputed from the rows' sums."""
    dq_TAD, dk_TKD, dv_TKD = (torch.empty_like(side) for side in (q_TAD, k_TKD, v_TKD))
    inner_TA = (gradient_TAD.float() * mixed_TAD.float()).sum(-1)  # each row's sum of probability times its gradient
    heads, key_heads = q_TAD.shape[1], k_TKD.shape[1]
    for bucket in _buckets(offsets.numpy().tobytes(), q_TAD.device):
        queries, keys, values = (_side_by_side(side, bucket, key_heads) for side in (q_TAD, k_TKD, v_TKD))
        gradients = _side_by_side(gradient_TAD, bucket, key_heads, padding=0.0)
        inner = _side_by_side(inner_TA[..., None], bucket, key_heads, padding=0.0)
        # infinite sums give padded rows probability 0; with another row's sum it could overflow
        sums = _side_by_side(sums_TA[..., None], bucket, key_heads, padding=float("inf"))
        dq, dk, dv = (torch.empty_like(side) for side in (queries, keys, values))
        for part in _blocks(len(queries), queries.shape[1] * keys.shape[1]):
            scores = _scores(queries[part], keys[part], scale, window, softcap)
            dcap = None if softcap is None else 1 - (scores / softcap).nan_to_num_(neginf=0.0).square_()
            shares = scores.sub_(sums[part]).exp_()
            torch.bmm(shares.to(gradients.dtype).transpose(1, 2), gradients[part], out=dv[part])
            dscores = (gradients[part] @ values[part].transpose(1, 2)).float()
            dscores.sub_(inner[part]).mul_(shares).mul_(scale)
            dscores = (dscores if dcap is None else dscores.mul_(dcap)).to(keys.dtype)
            torch.bmm(dscores, keys[part], out=dq[part])
            torch.bmm(dscores.transpose(1, 2), queries[part], out=dk[part])
        for whole, part_NRD, count in ((dq_TAD, dq, heads), (dk_TKD, dk, key_heads), (dv_TKD, dv, key_heads)):
            whole.index_copy_(0, bucket.tokens, _end_to_end(part_NRD, bucket, count))
    return dq_TAD, dk_TKD, dv_TKD


@_bucketed_backward.register_fake
def _(gradient: Tensor, q_TAD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_TAD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.options = inputs[4:]


def _backward(ctx: Any, gradient_TAD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as torch calls it
    *tensors, offsets = ctx.saved_tensors
    return (*_bucketed_backward(gradient_TAD, *tensors, offsets, *ctx.options), None, None, None, None)


_bucketed.register_autograd(_backward, setup_context=_save_for_backward)


def _side_by_side(x_TAD: Tensor, bucket: Bucket, key_heads: int, padding: float | None = None) -> Tensor:
    """Rows of a bucket, [N, R, D]: query heads that share a key head are rows of one product.

    Padding has the values of its text's first token, or ``padding``.
    """
    x_BLAD = x_TAD[bucket.index]
    if padding is not None:
        x_BLAD = x_BLAD.masked_fill(~bucket.real[:, :, None, None], padding)
    x_BKGLD: Tensor = x_BLAD.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    return x_BKGLD.flatten(2, 3).flatten(0, 1)


def _end_to_end(x_NRD: Tensor, bucket: Bucket, heads: int) -> Tensor:
    """The rows of a bucket without its padding, [tokens, A, D], in the order of ``bucket.tokens``."""
    sequences, length = bucket.index.shape
    x_BALD = x_NRD.view(sequences, heads, length, -1)
    return x_BALD.transpose(1, 2).flatten(0, 1)[bucket.slots]


def _blocks(heads: int, scores: int) -> Iterator[slice]:
    """Cut heads into even slices whose scores, ``scores`` for each head, fit in the CPU's cache."""
    count = min(heads, -(-heads * scores // _SCORES_AT_ONCE))
    for number in range(count):
        yield slice(heads * number // count, heads * (number + 1) // count)


def _scores(queries_NRD: Tensor, keys_NLD: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Scaled and capped scores [N, R, L] in float32, minus infinity for keys that a query does not attend to."""
    scores = (queries_NRD @ keys_NLD.transpose(1, 2)).float().mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    length = scores.shape[2]
    by_query = scores.view(len(scores), -1, length, length)
    by_query.masked_fill_(~_allowed(length, window, scores.device), float("-inf"))
    return scores


def _allowed(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query attends to, [L, L]: its own token's and earlier ones, at most ``window`` in all."""
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
    """Attention by autograd, text by text, for the few models that drop out attention probabilities in training."""
    groups, lengths = q_TAD.shape[1] // k_TKD.shape[1], offsets.diff().tolist()
    wide = (q_TAD, k_TKD.repeat_interleave(groups, 1), v_TKD.repeat_interleave(groups, 1))
    mixed = []
    for q, k, v in zip(*(side.transpose(0, 1).split(lengths, 1) for side in wide), strict=True):
        scores = (q @ k.transpose(1, 2)).float() * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_allowed(q.shape[1], window, q.device), float("-inf"))
        mixed.append(F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v)
    return torch.cat(mixed, 1).transpose(0, 1)
