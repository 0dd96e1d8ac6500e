"""Steps of both stages, in one process or several; losses, gradients and weights of them."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.data.pairs import TextPair
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_schema import Contrast, Lora, Reconstruct, Schedule
from anchorembed.system.processes import full_tensor, gathered_weights, leave_group, rank
from anchorembed.train.distributed import DDP_SETTINGS, wrap_for_processes
from anchorembed.train.stage import step
from stages import ready

SETTINGS: dict[str, Schedule] = {
    "stage1": Reconstruct(tokens_per_micro_batch=4000, sink=False),
    "stage1-micro": Reconstruct(tokens_per_micro_batch=110, bag_weight=0.5),
    "stage1-bag": ControlReconstruct(tokens_per_micro_batch=110, bag_weight=1.0, decode=False),
    "stage1-next": ControlReconstruct(tokens_per_micro_batch=110, directions="next_token"),
    "stage1-centred-untied": Reconstruct(tokens_per_micro_batch=110, anchor="centred"),
    "stage1-gradient": Reconstruct(tokens_per_micro_batch=4000, anchor="centred_gradient"),
    "stage1-read": Reconstruct(tokens_per_micro_batch=110, target_tokens=4, read_weight=0.7),
    "stage1-read-alone": ControlReconstruct(tokens_per_micro_batch=4000, read_weight=0.7, bag_weight=0.5, decode=False),
    "stage1-contrast": Reconstruct(tokens_per_micro_batch=110, contrast_weight=0.5),
    "stage1-contrast-alone-untied": ControlReconstruct(
        tokens_per_micro_batch=4000, contrast_weight=0.5, bag_weight=0.1, decode=False
    ),
    "stage1-adapters-untied": Reconstruct(tokens_per_micro_batch=110, lora=Lora(rank=2, dropout=0.0), anchor="centred"),
    "stage1-centred-biased": Reconstruct(tokens_per_micro_batch=110, anchor="centred"),
    "stage1-contrast-alone-biased": ControlReconstruct(tokens_per_micro_batch=4000, contrast_weight=0.5, decode=False),
    "stage2": Contrast(tokens_per_micro_batch=4000, lora=None, hard_negatives=1, learning_rate=1e-3),
    "stage2-cached": Contrast(tokens_per_micro_batch=60, lora=None, hard_negatives=1, mask_above=0.3, dimensions=[8]),
    # The scale keeps positives from a share of nearly 1, where the gradient is what rounding leaves of a difference.
    "stage2-taught": Contrast(
        tokens_per_micro_batch=60, lora=None, mask_above=0.0, guide="itself", distill=0.5, scale=5
    ),
    "stage2-biased": Contrast(tokens_per_micro_batch=4000, lora=None, scale=5),
}
BATCHES = (6, 5, 1)  # pairs: even, uneven, and fewer than processes


def pairs(count: int) -> list[TextPair]:
    return [
        TextPair(
            f"sort {n} rows",
            f"the rows {n} are sorted {'again ' * (n % 3)}",
            (f"other {n}",) * (n % 2),
            scores=(2.0, 1.0 - n) if n % 2 else (),
        )
        for n in range(count)
    ]


def model_of(folder: Path, name: str) -> Path:
    """The model that a setting trains: one whose head is its embedding, with a bias or without, or has weights."""
    return folder / next((model for model in ("untied", "biased") if name.endswith(model)), "tied")


def shard_on_cpus(accelerator: Accelerator) -> None:
    """Have accelerate prepare by FSDP2 as recipes/accelerate/8gpus-fsdp2.yaml says, which it does for GPUs only."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )


def run(folder: Path, settings: Schedule, shard: bool) -> dict[str, torch.Tensor]:
    """Three steps; everything that must not depend on the number of processes."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DDP_SETTINGS])
    torch.manual_seed(0)
    embedder = Embedder.load(folder, precision="float32", device="cpu", lengths=Lengths(30, 50))
    if isinstance(settings, Contrast) and settings.guide:
        settings = settings.model_copy(update={"guide": str(folder)})
    stage = ready(embedder, settings)
    module = stage.module
    for name, parameter in module.named_parameters():
        if "lora_B" in name:  # at 0 the others' gradients are 0
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("k_proj.bias"):  # attention does not depend on it: its gradients are rounding errors
            parameter.requires_grad_(False)
    updates = torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-4)
    if accelerator.num_processes > 1:
        assert accelerator.distributed_type == DistributedType.MULTI_CPU
        if shard:
            shard_on_cpus(accelerator)
        stage = wrap_for_processes(accelerator, stage, updates)
        assert isinstance(stage.module, FSDPModule if shard else nn.parallel.DistributedDataParallel)
        assert all(isinstance(parameter, DTensor) == shard for parameter in module.parameters())
        assert not shard or all(isinstance(layer, FSDPModule) for layer in embedder.backbone.model.base_model.layers)
    found: dict[str, torch.Tensor] = {}
    module.train()
    for number, count in enumerate(BATCHES):
        batch = pairs(count)
        metrics = step(stage, number, embedder.pairs.tokenize(batch, [""] * count))
        found |= {f"step{number}/{name}": torch.tensor(value) for name, value in metrics.items()}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found[f"step{number}/grad/{name}"] = full_tensor(parameter.grad).clone()
                # each gradient is a part of what DDP sends, so that there is one copy of it
                assert accelerator.num_processes == 1 or shard or parameter.grad._is_view(), name
        updates.step()
        updates.zero_grad(set_to_none=False)
    weights = gathered_weights(module)
    return found | {f"weights/{name}": value.clone() for name, value in weights.items()}


def leave_shards() -> NoReturn:
    """Leave, and end without the interpreter's teardown.

    DTensor's caches hold the mesh, and that gloo's threads, whatever `leave_group` destroys. One that has yet to let go
    of the last collective's tensors asks for the GIL, and is killed with its process if teardown has begun (pytorch
    issue 190489). Only tests shard on CPUs: without a mesh `leave_group` ends these threads.
    """
    leave_group()
    sys.stderr.flush()
    os._exit(0)


def write_steps(models: Path, out: Path, shard: bool) -> None:
    """Run every setting, and write what the first process found."""
    for name, settings in SETTINGS.items():
        found = run(model_of(models, name), settings, shard)
        if rank() == 0:
            out.mkdir(exist_ok=True)
            save_file({key: value.contiguous() for key, value in found.items()}, out / name)
