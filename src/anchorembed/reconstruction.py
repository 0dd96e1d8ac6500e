"""Stage I: write the other side of a pair from one anchor vector (EBQ2D, EBD2Q; Su et al., EMNLP 2025, section 3).

Pure functions that never see a model. The decoder's input for a text ``x_1 .. x_n`` is ``[anchor, E(x_1) .. E(x_n)]``
and its targets are ``x_1 .. x_n, EOS``: the anchor stands directly before the first target, whatever the batch, and
every position from the anchor on has a target.

A *sink* is an EOS before the anchor, ``[E(EOS), anchor, E(x_1) .. E(x_n)]``, that predicts nothing; the paper has none.
Trained decoders make the first position their attention sink (Xiao et al., 2024, arXiv 2309.17453); where that is the
anchor, they write worse until they are trained to (docs/results.md).

A *bag* is asked of the anchor alone, without decoding: the same targets, EOS and repeats among them, in any order, each
by the one distribution that the head makes of the anchor (Li et al., Llama2Vec, 2024, arXiv 2312.15503). The paper has
none.

Axes: T packed positions, H hidden size, V vocabulary, N texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from anchorembed.kernels import fused, gradient_to_add_to, low
from anchorembed.packing import PackedBatch, pack

Context = Any  # torch gives autograd contexts no type that has what they have
CHUNK_LOGITS = 2**25  # logits that exist at once: 64 MB in bfloat16, and their gradient's, whatever the vocabulary

_SLICE = 8192  # words whose gradient is made at once


@dataclass(frozen=True, slots=True)
class Decoding:
    """Texts to be written: ``batch`` has a free slot in each text for its anchor, after a sink if there is one.

    ``slots`` [N] are the anchors' positions, ``predicting`` [P] those with a target, and ``targets`` [P] are theirs;
    each text has ``counts`` [N] of them.
    """

    batch: PackedBatch
    slots: Tensor
    predicting: Tensor
    targets: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> "Decoding":
        """Return the same on ``device``."""
        rest = (self.slots, self.predicting, self.targets, self.counts)
        return Decoding(self.batch.to(device), *(tensor.to(device) for tensor in rest))


def decoding(texts: Sequence[Sequence[int]], end_id: int, sink: bool = False) -> Decoding:
    """Lay out texts, as their own tokens without template, to be written from one anchor each."""
    before = [end_id] if sink else []
    batch = pack([[*before, end_id, *text] for text in texts])
    slots = batch.starts + len(before)
    predicting = (batch.positions >= len(before)).nonzero().flatten()
    # What comes before a text's own tokens is EOS, so what follows each text, the next one's start, is its last target.
    return Decoding(batch, slots, predicting, batch.tokens.roll(-1)[predicting], batch.lengths - len(before))


def insert_anchors(vectors_TH: Tensor, anchors_NH: Tensor, slots: Tensor) -> Tensor:
    """Put each text's anchor, unscaled, into its slot; gradients flow to both."""
    return vectors_TH.index_copy(0, slots, anchors_NH.to(vectors_TH.dtype))


def linear_cross_entropy(
    states_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    counts_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of ``cap(scale * (states @ weight.T + bias))`` without ever holding all logits.

    Each state has one target, or those of its bag: ``counts_S`` of them, in order.

    Products run in autocast's dtype, sums and softmax in float32. Gradients are computed with the loss, a chunk of
    positions at a time.

    Returns:
        The sum over positions of ``weights_T`` times the loss, and the unweighted losses [T] in nats, without gradient.
    """
    device = states_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_TH.dtype
    total = gradient_to_add_to(weight_VH)
    counts = None if counts_S is None else counts_S.tolist()
    options = _Options(scale, softcap, dtype, torch.is_grad_enabled(), total, counts)
    return _apply(states_TH, weight_VH, bias_V, targets_T, weights_T.float(), options)


@dataclass(frozen=True, slots=True)
class _Options:
    scale: float
    softcap: float | None
    dtype: torch.dtype
    with_gradients: bool
    total: Tensor | None  # where to add the weight's gradient at once, rather than hand it on
    counts: list[int] | None  # targets of each state, if not one


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        states_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        weights_T: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        need_states, need_weight, need_bias = (options.with_gradients and need for need in ctx.needs_input_grad[:3])
        grad_states = torch.empty_like(states_TH) if need_states else None
        grad_weight = options.total
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
        losses_T = torch.empty(len(targets_T), dtype=torch.float32, device=states_TH.device)
        step = max(16, CHUNK_LOGITS // weight_VH.shape[0])
        with torch.autocast(states_TH.device.type, enabled=False):
            weight = low(weight_VH, options.dtype)
            buffer = states_TH.new_empty(min(step, len(states_TH)), len(weight), dtype=options.dtype)
            bounds = None if options.counts is None else [0, *accumulate(options.counts)]
            for start in range(0, len(states_TH), step):
                rows = slice(start, min(start + step, len(states_TH)))
                asked = rows if bounds is None else slice(bounds[rows.start], bounds[rows.stop])  # of the targets
                states = states_TH[rows].to(options.dtype)
                logits = torch.mm(states, weight.T, out=buffer[: len(states)])
                problem = (logits, targets_T[asked], weights_T[asked], bias_V, options.scale, options.softcap)
                if options.counts is None:
                    losses_T[asked], slope = _loss_and_slope(*problem)
                else:
                    losses_T[asked], slope = _bag_and_slope(options.counts[rows], *problem)
                if grad_states is not None:
                    grad_states[rows] = slope @ weight
                if grad_weight is not None:
                    for low_row in range(0, len(weight), _SLICE):
                        words = slice(low_row, low_row + _SLICE)
                        grad_weight[words] += slope[:, words].T @ states
                if grad_bias is not None:
                    grad_bias += slope.sum(0, dtype=torch.float32)
        ctx.in_place = options.total is not None
        ctx.save_for_backward(grad_states, None if ctx.in_place else grad_weight, grad_bias)
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * weights_T).sum(), losses_T

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0]
        if ctx.in_place and float(factor) != 1.0:
            raise ValueError(f"linear_cross_entropy: its loss was scaled by {float(factor)}; scale weights_T instead")
        scaled = [None if saved is None else saved.mul_(factor.to(saved.dtype)) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None)


_apply: Callable[..., tuple[Tensor, Tensor]] = _LinearCrossEntropy.apply


@fused
def _loss_and_slope(
    products: Tensor, targets: Tensor, weights: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [T], and the gradient of their weighted sum with respect to ``products``, ``states @ weight.T``."""
    logits = _capped(products, bias_V, scale, softcap)
    normalizer = logits.logsumexp(-1, keepdim=True)
    losses = normalizer[:, 0] - logits.gather(1, targets[:, None])[:, 0]
    is_target = torch.arange(logits.shape[1], device=targets.device) == targets[:, None]
    slope = ((logits - normalizer).exp() - is_target.float()) * (weights[:, None] * scale)
    if softcap is not None:
        slope = slope * (1.0 - (logits / softcap) ** 2)
    return losses, slope.to(products.dtype)


def _bag_and_slope(
    counts: list[int],
    products: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `_loss_and_slope`, with ``counts`` targets a row."""
    logits = _capped(products, bias_V, scale, softcap)
    device = products.device
    rows = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    normalizer = logits.logsumexp(-1, keepdim=True)
    losses = normalizer[rows, 0] - logits[rows, targets]
    asked = torch.zeros(len(counts), device=device).index_add_(0, rows, weights)
    slope = (logits - normalizer).exp() * asked[:, None]
    slope = slope.index_put_((rows, targets), -weights, accumulate=True) * scale
    if softcap is not None:
        slope = slope * (1.0 - (logits / softcap) ** 2)
    return losses, slope.to(products.dtype)


def _capped(products: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = products.float()
    if bias_V is not None:
        logits = logits + bias_V.float()
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
