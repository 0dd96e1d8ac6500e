"""Multi-process training: each process takes a part of a step's pairs; vectors, sums and weights are gathered.

The parts are consecutive, so together they are the step of a single process. DDP and FSDP average gradients over the
processes; a loss is therefore multiplied by their number. A single process communicates nothing.

Axes: N rows of all processes, H hidden size.
"""

import os
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
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_process() -> bool:
    """Whether this process is the first or only one; before the process group exists, the variable RANK decides."""
    return (rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def shares(items: Sequence[T]) -> list[Sequence[T]]:
    """Cut items into consecutive parts, one for each process; a remainder goes to the first parts, one item each."""
    size, rest = divmod(len(items), processes())
    bounds = [0]
    for number in range(processes()):
        bounds.append(bounds[-1] + size + (number < rest))
    return [items[start:stop] for start, stop in pairwise(bounds)]


def summed(values: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def summed_with_gradient(values: Tensor) -> Tensor:
    """The sum over processes; its gradient is the sum of the processes' gradients."""
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


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. A single process does not use the device."""
    return flag if processes() == 1 else bool(summed(torch.tensor(float(flag), device=device)) > 0)


def gathered(rows_NH: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all processes, [N, H]: ``counts[i]`` of process i; gradients flow to this process's rows."""
    if processes() == 1:
        return rows_NH
    padded = rows_NH.new_zeros(max(counts), rows_NH.shape[1])
    padded[: len(rows_NH)] = rows_NH.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[rank()] = rows_NH
    return torch.cat(parts)


def wait_for_all() -> None:
    """Wait until all processes have called this."""
    if processes() > 1:
        dist.barrier()


def leave_group() -> None:
    """Destroy the process group once all work is done: its threads must not outlive the interpreter."""
    if dist.is_initialized():
        dist.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered whole, if all processes call this; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, moved to the device of ``pattern`` and sharded like it."""
    if not isinstance(pattern, DTensor):
        return tensor.to(pattern.device)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


def sharded(module: nn.Module) -> bool:
    """Whether a module's weights are sharded over the processes, even if they are gathered at the moment."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Free gathered weights: a forward pass without a backward pass leaves some of them whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def on_first_process(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gather tensors one by one onto the first process's CPU; all processes must call this, the others get none."""
    gathered_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = full_tensor(tensor.detach())
        if rank() == 0:
            gathered_tensors[name] = value.cpu()
    return gathered_tensors


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights of a sharded module, as `on_first_process` gives them."""
    reshard(module)
    return on_first_process(module.named_parameters())
