"""Pack token sequences end to end. Nothing is padded; ``offsets`` marks where each text begins.

Attention alone needs sequences side by side. A ``Bucket`` lays those of like length so, padded on the right, where
causal attention never looks at the padding, and says how to get back.

Axes: T packed tokens, N sequences, B sequences in a bucket, L longest in the bucket.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_WASTE = 1.25  # a bucket's longest sequence is at most this many times its shortest


@dataclass(frozen=True)
class PackedBatch:
    """N sequences end to end: ``tokens`` [T]; sequence i runs from ``offsets[i]`` to before ``offsets[i + 1]``."""

    tokens: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def starts(self) -> Tensor:
        """Position of each sequence's first token, [N]."""
        return self.offsets[:-1]

    @cached_property
    def anchors(self) -> Tensor:
        """Position of each sequence's last token, its EOS, [N]."""
        return self.offsets[1:] - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens in each sequence, [N]."""
        return self.offsets.diff()

    @cached_property
    def positions(self) -> Tensor:
        """Each token's position within its own sequence, from 0, [T]."""
        return torch.arange(len(self.tokens), device=self.tokens.device) - self.starts.repeat_interleave(self.lengths)

    @cached_property
    def buckets(self) -> "tuple[Bucket, ...]":
        """These sequences side by side for attention, computed once a batch."""
        return lay_out(self.offsets)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the same batch on ``device``."""
        return PackedBatch(self.tokens.to(device), self.offsets.to(device))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of like length side by side, padded on the right.

    ``index`` [B, L] names the packed token in each slot and ``real`` [B, L] says which slots are not padding;
    ``tokens`` and ``slots`` name, for each real slot, its packed token and its place among the B * L slots.
    """

    index: Tensor
    real: Tensor
    tokens: Tensor
    slots: Tensor


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Pack token sequences end to end.

    Raises:
        ValueError: if there is no sequence or one is empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError("pack: every sequence needs at least one token, and there must be one sequence")
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.long)
    offsets[1:] = torch.tensor(lengths).cumsum(0)
    return PackedBatch(tokens, offsets)


def lay_out(offsets: Tensor) -> tuple[Bucket, ...]:
    """Group sequences into buckets whose longest is at most 1.25 times the shortest."""
    lengths = offsets.diff().tolist()
    buckets: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if buckets and lengths[sequence] <= _WASTE * lengths[buckets[-1][0]]:
            buckets[-1].append(sequence)
        else:
            buckets.append([sequence])
    laid = []
    for bucket in buckets:
        members, length = torch.tensor(bucket, device=offsets.device), lengths[bucket[-1]]
        slots_BL = torch.arange(length, device=offsets.device).expand(len(bucket), length)
        real_BL = slots_BL < offsets.diff()[members][:, None]
        index_BL = offsets[members][:, None] + slots_BL * real_BL
        laid.append(Bucket(index_BL, real_BL, index_BL[real_BL], real_BL.flatten().nonzero().flatten()))
    return tuple(laid)


def micro_batches(costs: Sequence[int], budget: int) -> Iterator[range]:
    """Cut items into consecutive runs of at most ``budget`` summed cost, in tokens; one that costs more is alone."""
    first, total = 0, 0
    for index, cost in enumerate(costs):
        if index > first and total + cost > budget:
            yield range(first, index)
            first, total = index, 0
        total += cost
    if first < len(costs):
        yield range(first, len(costs))
