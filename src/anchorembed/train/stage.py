"""What both stages share: metrics on the device, read back once a step, and texts sorted by length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anchorembed.model.packing import micro_batches

Metrics = dict[str, float]
Measured = dict[str, Tensor]  # metrics that still are on the device, scalars


def read_back(measured: Measured) -> Metrics:
    """Metrics as numbers: the one time in a step that the CPU waits for the device."""
    if not measured:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def by_length(costs: Sequence[int], budget: int) -> tuple[list[int], list[range]]:
    """Items by cost, highest first, and runs of that order within the budget.

    Like lengths together make few and large buckets of attention.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    return order, list(micro_batches([costs[i] for i in order], budget))
