"""Pack token sequences end to end. Nothing is padded; ``offsets`` marks where each text begins.

All that a forward pass needs to know about a batch is computed here, on the CPU, so that nothing waits for a GPU. Only
bucketed attention needs sequences side by side. A ``Bucket`` holds sequences of like length, padded on the right, where
causal attention never looks.

Axes: T packed tokens, N sequences, B sequences in a bucket, L tokens in the bucket's longest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LONGEST_TO_SHORTEST = 1.25  # largest ratio of lengths in a bucket


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N sequences end to end: sequence i runs from ``offsets[i]`` to before ``offsets[i + 1]``."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T], each token's position within its sequence, from 0
    anchors: Tensor  # [N], index of each sequence's last token, its EOS
    ends: Tensor  # [N + 1], the offsets in int32, on the batch's device, as the varlen kernel takes them
    offsets: Tensor  # [N + 1], int64, always on the CPU
    longest: int  # tokens in the longest sequence

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the same batch on ``device``."""
        return replace(
            self,
            tokens=send(self.tokens, device),
            positions=send(self.positions, device),
            anchors=send(self.anchors, device),
            ends=send(self.ends, device),
        )


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of like length side by side, padded on the right.

    ``index`` [B, L] is the packed token of each slot, for padding the sequence's first; ``real`` [B, L] says which
    slots are not padding. For these, in order, ``tokens`` is the packed token and ``slots`` the slot among B * L.
    """

    index: Tensor
    real: Tensor
    tokens: Tensor
    slots: Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU from pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Pack token sequences end to end, on the CPU.

    Raises:
        ValueError: if there is no sequence or one is empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError("pack: every sequence needs at least one token, and there must be one sequence")
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.arange(len(tokens)) - offsets[:-1].repeat_interleave(offsets.diff())
    return PackedBatch(tokens, positions, offsets[1:] - 1, offsets.int(), offsets, max(lengths))


def lay_out(offsets: Tensor) -> tuple[Bucket, ...]:
    """Group sequences into buckets whose longest is at most 1.25 times the shortest, on the CPU.

    ``offsets`` [N + 1] are those of a packed batch.
    """
    lengths = offsets.diff().tolist()
    groups: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[sequence] <= _LONGEST_TO_SHORTEST * lengths[groups[-1][0]]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    buckets = []
    for group in groups:
        sequences_B, length = torch.tensor(group), lengths[group[-1]]
        slots_BL = torch.arange(length).expand(len(group), length)
        real_BL = slots_BL < offsets.diff()[sequences_B][:, None]
        index_BL = offsets[sequences_B][:, None] + slots_BL * real_BL
        buckets.append(Bucket(index_BL, real_BL, index_BL[real_BL], real_BL.flatten().nonzero().flatten()))
    return tuple(buckets)


def micro_batches(costs: Sequence[int], budget: int) -> Iterator[range]:
    """Cut items into consecutive ranges whose costs sum up to ``budget`` at most; an item that costs more is alone.

    Costs and budget are in one unit, such as tokens.
    """
    start, total = 0, 0
    for index, cost in enumerate(costs):
        if index > start and total + cost > budget:
            yield range(start, index)
            start, total = index, 0
        total += cost
    if start < len(costs):
        yield range(start, len(costs))


def by_length(costs: Sequence[int], budget: int) -> tuple[list[int], list[range]]:
    """Items by cost, highest first, and runs of that order within the budget.

    Texts of like length together make few, large buckets of attention.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    return order, list(micro_batches([costs[i] for i in order], budget))
