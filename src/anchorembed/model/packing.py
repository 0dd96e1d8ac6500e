"""Pack token sequences end to end. Nothing is padded; ``offsets`` marks where each text begins.

All that a pass needs to know about a batch is computed here, on the CPU, so that a pass on a GPU asks it nothing.
The bucketed attention alone needs sequences side by side: a ``Bucket`` lays those of like length so, padded on the
right, where causal attention never looks at the padding, and says how to get back.

Axes: T packed tokens, N sequences, B sequences in a bucket, L longest in the bucket.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WASTE = 1.25  # a bucket's longest sequence is at most this many times its shortest


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N sequences end to end: sequence i runs from ``offsets[i]`` to before ``offsets[i + 1]``."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T], each token's position within its own sequence, from 0
    anchors: Tensor  # [N], position of each sequence's last token, its EOS
    ends: Tensor  # [N + 1], the offsets as attention kernels want them: int32, on the batch's device
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

    ``index`` [B, L] names the packed token in each slot and ``real`` [B, L] says which slots are not padding;
    ``tokens`` and ``slots`` name, for each real slot, its packed token and its place among the B * L slots.
    """

    index: Tensor
    real: Tensor
    tokens: Tensor
    slots: Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU from pinned memory, so that nothing waits for the copy."""
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
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.long)
    offsets[1:] = torch.tensor(lengths).cumsum(0)
    positions = torch.arange(len(tokens)) - offsets[:-1].repeat_interleave(offsets.diff())
    return PackedBatch(tokens, positions, offsets[1:] - 1, offsets.int(), offsets, max(lengths))


def lay_out(offsets: Tensor) -> tuple[Bucket, ...]:
    """Group sequences into buckets whose longest is at most 1.25 times the shortest; all on the CPU, as ``offsets``."""
    lengths = offsets.diff().tolist()
    buckets: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if buckets and lengths[sequence] <= _WASTE * lengths[buckets[-1][0]]:
            buckets[-1].append(sequence)
        else:
            buckets.append([sequence])
    laid = []
    for bucket in buckets:
        members, length = torch.tensor(bucket), lengths[bucket[-1]]
        slots_BL = torch.arange(length).expand(len(bucket), length)
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
