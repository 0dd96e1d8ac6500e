"""Cross-entropy of the output head in chunks: no more than a chunk of logits exists at once, forward and backward.

A *bag* is all targets of a text, EOS and repeats included, predicted from a single state without order: each by the
head's distribution for that state (Li et al., Llama2Vec, 2024, arXiv 2312.15503). The paper has no bags.

Axes: T states, H hidden size, V vocabulary, N texts.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from anchorembed.errors import first_line

_log = logging.getLogger(__name__)
Context = Any  # torch has no type with the attributes of autograd contexts
Softmax = Callable[[Tensor, Tensor, Tensor | None, float, float | None], tuple[Tensor, Tensor]]
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**28}  # logits at once, with as many gradients; 2 bytes each in bfloat16
_SLICE = 8192  # words whose gradient is computed at once where a product cannot sum in float32


def linear_cross_entropy(
    states_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    bags: tuple[Sequence[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of ``cap(scale * (states @ weight.T + bias))`` without ever holding all logits.

    Each state has one target, or with ``bags`` several: ``bags`` is the number of targets of each state, in order, and
    the index of each target's state, [T].

    Products run in autocast's dtype, sums and softmax in float32. Gradients are computed with the loss, a chunk of
    positions at a time; nothing waits for a GPU.

    Returns:
        The sum over positions of ``weights_T`` times the loss, and the unweighted losses [T] in nats, without gradient.
    """
    with_gradients = torch.is_grad_enabled()  # not known inside, where it is off
    return _apply(states_TH, weight_VH, bias_V, targets_T, weights_T.float(), scale, softcap, bags, with_gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - a gradient for each, so no object holds them
        ctx: Context,
        states_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        weights_T: Tensor,
        scale: float,
        softcap: float | None,
        bags: tuple[Sequence[int], Tensor] | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        device = states_TH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_TH.dtype
        need_states, need_weight, need_bias = (with_gradients and need for need in ctx.needs_input_grad[:3])
        grad_states = torch.empty_like(states_TH) if need_states else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
        losses_T = torch.empty(len(targets_T), dtype=torch.float32, device=states_TH.device)
        step = max(16, CHUNK_LOGITS.get(device, 2**25) // weight_VH.shape[0])
        bounds = None if bags is None else [0, *accumulate(bags[0])]
        with torch.autocast(device, enabled=False):
            weight = weight_VH.detach().to(dtype)
            for start in range(0, len(states_TH), step):
                rows = slice(start, min(start + step, len(states_TH)))
                chosen = rows if bounds is None else slice(bounds[rows.start], bounds[rows.stop])  # targets of the rows
                states = states_TH[rows].to(dtype)
                products = states @ weight.T
                problem = (products, targets_T[chosen], weights_T[chosen], bias_V, scale, softcap)
                if bags is None:
                    losses_T[chosen], gradient = _loss_and_gradient(*problem)
                else:
                    losses_T[chosen], gradient = _bag_and_gradient(bags[1][chosen] - start, *problem)
                if grad_states is not None:
                    grad_states[rows] = gradient @ weight
                if grad_weight is not None:
                    _add_product(grad_weight, gradient, states)
                if grad_bias is not None:
                    grad_bias += gradient.sum(0, dtype=torch.float32)
                del products, problem, gradient  # else they are still in memory beside the next chunk's
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * weights_T).sum(), losses_T

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0]
        scaled = [None if saved is None else saved.mul_(factor.to(saved.dtype)) for saved in ctx.saved_tensors]
        return (*scaled, *[None] * 6)


_apply: Callable[..., tuple[Tensor, Tensor]] = _LinearCrossEntropy.apply


def _add_product(total_VH: Tensor, gradient_TV: Tensor, states_TH: Tensor) -> None:
    """Add ``gradient.T @ states`` to a float32 total: one product on a GPU, elsewhere slices of the vocabulary."""
    if total_VH.device.type == "cuda" and gradient_TV.dtype != torch.float32:
        torch.addmm(total_VH, gradient_TV.T, states_TH, out_dtype=torch.float32, out=total_VH)
        return
    for start in range(0, len(total_VH), _SLICE):
        words = slice(start, start + _SLICE)
        total_VH[words] += gradient_TV[:, words].T @ states_TH


def _loss_and_gradient(
    products: Tensor, targets: Tensor, weights: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [T], and the gradient of their weighted sum with respect to ``products``, ``states @ weight.T``."""
    target_logits = _capped(
        products.gather(1, targets[:, None]), None if bias_V is None else bias_V[targets][:, None], scale, softcap
    )
    softmax = _compiled_softmax(products.device, products.dtype) if products.is_cuda else _softmax
    normalizer, gradient = softmax(products, weights, bias_V, scale, softcap)
    losses = (normalizer - target_logits)[:, 0]
    at_target = ((-losses).exp() - 1) * weights * scale  # in float32: near 1 the difference would be lost in bfloat16
    if softcap is not None:
        at_target = at_target * (1.0 - (target_logits[:, 0] / softcap) ** 2)
    return losses, gradient.scatter_(1, targets[:, None], at_target[:, None].to(gradient.dtype))


def _softmax(
    products: Tensor, weights: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log of the softmax's sum, [T, 1], and the gradient of the weighted losses without the targets' own terms."""
    logits = _capped(products, bias_V, scale, softcap)
    normalizer = logits.logsumexp(-1, keepdim=True)
    gradient = (logits - normalizer).exp_().mul_(weights[:, None] * scale)
    if softcap is not None:
        gradient = gradient * (1.0 - (logits / softcap) ** 2)
    return normalizer, gradient.to(products.dtype)


@functools.cache
def _compiled_softmax(device: torch.device, dtype: torch.dtype) -> Softmax:
    """`_softmax` compiled into one pass over the GPU's memory; uncompiled, with a warning, if that fails."""
    compiled: Softmax = torch.compile(_softmax, dynamic=True)
    products, weights = torch.zeros(2, 8, device=device, dtype=dtype), torch.ones(2, device=device)
    try:
        compiled(products, weights, None, 1.0, None)
    except Exception as error:  # the compiler raises errors of many kinds
        _log.warning("the loss is not compiled, slower: %s", first_line(error))
        return _softmax
    return compiled


def _bag_and_gradient(
    rows: Tensor,
    products: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `_loss_and_gradient`, with any number of targets for each row; ``rows`` is each target's row."""
    logits = _capped(products, bias_V, scale, softcap)
    normalizer = logits.logsumexp(-1, keepdim=True)
    losses = normalizer[rows, 0] - logits[rows, targets]
    weights_of_rows = torch.zeros(len(products), device=products.device).index_add_(0, rows, weights)
    gradient = (logits - normalizer).exp() * weights_of_rows[:, None]
    gradient = gradient.index_put_((rows, targets), -weights, accumulate=True) * scale
    if softcap is not None:
        gradient = gradient * (1.0 - (logits / softcap) ** 2)
    return losses, gradient.to(products.dtype)


def _capped(products: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = products.float()
    if bias_V is not None:
        logits = logits + bias_V.float()
    logits = logits * scale if scale != 1.0 else logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
