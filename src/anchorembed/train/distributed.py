"""Training in several processes with accelerate (DDP or FSDP2), and the run's trackers."""

import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.system.device import find_device
from anchorembed.train.prepare import load_embedder
from anchorembed.train.stage import Stage

_TIMEOUT = timedelta(hours=3)  # of waiting for the first process; torch's default on GPUs is 10 minutes
# Processes differ in their number of passes. Gradients are views of what is sent, without a second copy of them.
DDP_SETTINGS = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def open_accelerator(recipe: Recipe, settings: Schedule, folder: Path) -> Accelerator:
    """Join the processes of a launcher, if there is one, and open the run's trackers."""
    _check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=find_device(recipe.model.device).type == "cpu",
        log_with=recipe.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[
            DDP_SETTINGS,
            InitProcessGroupKwargs(timeout=_TIMEOUT),  # while the first process converts, downloads or writes
        ],
    )
    _check_supported(accelerator, settings)
    if accelerator.is_fsdp2 and recipe.model.weights != "float32":
        stored = recipe.model.weights
        raise InputError(f"model.weights: {stored} cannot be sharded (FSDP2). Set it to float32, or use DDP.")
    return accelerator


def wrap_for_processes(accelerator: Accelerator, stage: Stage, optimizer: torch.optim.Optimizer) -> Stage:
    """Have accelerate wrap or shard the module that a stage trains."""
    if accelerator.is_fsdp2:  # accelerate finds the layers' classes only in transformers' modules
        layers = [*(stage.embedder.backbone.model._no_split_modules or [])]
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers
    with warnings.catch_warnings():  # accelerate passes broadcast_buffers by a name that torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        wrapped, _ = accelerator.prepare(stage.module, optimizer)  # sharding gives the optimizer its shards in place
    if accelerator.is_fsdp2:  # unsynced, FSDP2 would keep whole gradients until the last micro-batch
        return replace(stage, module=wrapped)
    return replace(stage, module=wrapped, unsynced=lambda: accelerator.no_sync(wrapped))


def _check_supported(accelerator: Accelerator, settings: Schedule) -> None:
    """Refuse settings of accelerate that the loop does not support."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise InputError(
            f"accelerate: {kind.value} is not supported. Use DDP or FSDP2, as recipes/accelerate has them."
        )
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"accelerate: mixed precision is {accelerator.mixed_precision}, which rounds gradients and states, too. "
            "Say no there; model.precision rounds products alone."
        )
    if accelerator.is_fsdp2 and settings.evaluate_on:
        raise InputError("evaluate_on: not with sharded weights (FSDP2). Evaluate the finished model, or use DDP.")


def embedder_with(
    recipe: Recipe, stage_class: type[Stage], settings: Schedule, start: str, weights: dict[str, Tensor]
) -> Embedder:
    """A stage's start model, on the CPU, with the trained ``weights``."""
    embedder = load_embedder(recipe, start, "cpu")
    with torch.no_grad():
        for name, parameter in stage_class.trained_module(embedder, settings).named_parameters():
            parameter.copy_(weights[name])
    return embedder


def _check_trackers(names: list[str]) -> None:
    available = [str(tracker.value) for tracker in get_available_trackers()]
    if missing := [name for name in names if name not in available]:
        raise InputError(f"trackers: {missing[0]!r} is not installed. Installed: {', '.join(available) or 'none'}.")
