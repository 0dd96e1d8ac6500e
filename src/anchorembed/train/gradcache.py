"""The gradients of one big contrastive batch in the memory of a small one (GradCache; Gao et al., 2021).

Embed all chunks without a graph, get the loss's gradient with respect to the embeddings, then embed each chunk again
with a graph and push its gradient through. Random state is replayed, so dropout is the same in both passes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


class GradCache(Generic[Chunk]):
    """The embeddings ``vectors_NH`` of all chunks, [N, H], and the backward pass of a loss of them.

    Args:
        embed: embeds one chunk, [n, H]. Called again in the backward pass if there are several chunks.
        chunks: the batch, in order.
        device: where chunks are embedded, and dropout draws.
    """

    def __init__(self, embed: Callable[[Chunk], Tensor], chunks: Sequence[Chunk], device: torch.device) -> None:
        self._embed, self._chunks, self._device = embed, chunks, device
        if len(chunks) == 1:
            self.vectors_NH = embed(chunks[0])
            return
        self._states, parts = [], []
        for chunk in chunks:
            self._states.append(_random_state(device))
            with torch.no_grad():
                parts.append(embed(chunk))
        self._sizes = [len(part) for part in parts]
        self.vectors_NH = torch.cat(parts).detach().requires_grad_()

    def backward(self, loss: Tensor, unsynced: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        """Accumulate the gradient of a loss, a scalar from ``vectors_NH``, into the weights behind ``embed``.

        ``unsynced`` opens a context without gradient averaging between processes, for all chunks but the last.
        """
        if len(self._chunks) == 1:
            loss.backward()
            return
        (gradient,) = torch.autograd.grad(loss, self.vectors_NH)
        state_after = _random_state(self._device)
        parts = zip(self._chunks, self._states, gradient.split(self._sizes), strict=True)
        for number, (chunk, state, part) in enumerate(parts, 1):
            _set_random_state(state, self._device)
            with nullcontext() if number == len(self._chunks) else unsynced():
                torch.autograd.backward(self._embed(chunk), part)
        _set_random_state(state_after, self._device)


RandomState = tuple[Tensor, Tensor | None]


def _random_state(device: torch.device) -> RandomState:
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "mps":
        torch.mps.set_rng_state(state[1])
    elif state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
