"""The gradients of one big contrastive batch in the memory of a small one (GradCache; Gao et al., 2021).

Embed all chunks without a graph, get the loss's gradient with respect to the embeddings, then embed each chunk again
with a graph and push its gradient through. Random state is replayed, so dropout is the same both times.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


def cached_backward(
    embed: Callable[[Chunk], Tensor],
    chunks: Sequence[Chunk],
    loss: Callable[[Tensor], Tensor],
    device: torch.device,
    factor: float = 1.0,
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Accumulate the gradient of ``loss(concatenated embeddings)`` into the weights behind ``embed``.

    Args:
        embed: embeds one chunk, [n, H]. Called once a chunk if there is one chunk, else twice.
        chunks: the batch, in order.
        loss: a scalar from the embeddings [N, H] of all chunks.
        device: where chunks are embedded, and dropout draws.
        factor: multiplies the gradients.
        unsynced: opens a context without gradient averaging between processes, for all chunks but the last.

    Returns:
        The loss, without gradient.
    """
    if len(chunks) == 1:
        value = loss(embed(chunks[0]))
        (factor * value).backward()
        return value.detach()
    states, parts = [], []
    for chunk in chunks:
        states.append(_random_state(device))
        with torch.no_grad():
            parts.append(embed(chunk))
    embeddings = torch.cat(parts).detach().requires_grad_()
    value = loss(embeddings)
    (gradient,) = torch.autograd.grad(factor * value, embeddings)
    after = _random_state(device)
    sizes = [len(part) for part in parts]
    for number, (chunk, state, part) in enumerate(zip(chunks, states, gradient.split(sizes), strict=True), 1):
        _set_random_state(state, device)
        with nullcontext() if number == len(chunks) else unsynced():
            torch.autograd.backward(embed(chunk), part)
    _set_random_state(after, device)
    return value.detach()


RandomState = tuple[Tensor, Tensor | None]


def _random_state(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
