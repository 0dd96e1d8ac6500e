"""Several processes as one: a step's pairs are shared out, and what must be whole is gathered. Alone, nothing happens.

Each process works on a run of the step's pairs, in order, so that together they are the step of one process. Whatever
wraps the module averages gradients over the processes; a loss is therefore multiplied by their number.

Axes: N rows of all processes, H hidden size.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def processes() -> int:
    """How many work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def shares(items: Sequence[T]) -> list[Sequence[T]]:
    """A run of the items for each process, in order; the first ones get one more where it does not divide."""
    size, rest = divmod(len(items), processes())
    bounds = [0]
    for number in range(processes()):
        bounds.append(bounds[-1] + size + (number < rest))
    return [items[first:last] for first, last in pairwise(bounds)]


def summed(values: Tensor) -> Tensor:
    """The sum over processes."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def summed_with_gradient(values: Tensor) -> Tensor:
    """The sum over processes, whose gradient is the sum of theirs."""
    if processes() == 1:
        return values
    total: Tensor = all_reduce(values)
    return total


def lowest(value: int, device: torch.device) -> int:
    """The lowest of all processes' values."""
    if processes() == 1:
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return int(values)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; all get the same answer. One process alone asks the device nothing."""
    return flag if processes() == 1 else bool(summed(torch.tensor(float(flag), device=device)) > 0)


def gathered(rows_NH: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all processes, [N, H], ``counts`` of each; gradients flow to this process's own."""
    if processes() == 1:
        return rows_NH
    padded = rows_NH.new_zeros(max(counts), rows_NH.shape[1])
    padded[: len(rows_NH)] = rows_NH.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[rank()] = rows_NH
    return torch.cat(parts)


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def leave() -> None:
    """End the group of processes in order, once all work is done: its threads must not outlive the interpreter."""
    if dist.is_initialized():
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as it is in one piece; all processes must ask. Any other tensor is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor sharded as ``pattern`` is, on its device."""
    if not isinstance(pattern, DTensor):
        return tensor.to(pattern.device)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


def sharded(module: nn.Module) -> bool:
    """Whether weights are spread over the processes, be they whole for the moment."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Share weights out again: a forward pass without a backward leaves some whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def on_the_first(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors, one after the other, on the CPU of the first process; the others, which must ask too, get none."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = whole(tensor.detach())
        if rank() == 0:
            found[name] = value.cpu()
    return found


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights of a sharded module, as `on_the_first` gives them."""
    reshard(module)
    return on_the_first(module.named_parameters())
