"""Checkpoints: written whole or not at all; a resumed run gives the same result as an uninterrupted one.

A checkpoint is a folder ``step-000200`` with trainable weights and optimizer state as safetensors and the rest as JSON:
the step, the run's plan and the versions of what computed it. It is written under another name, synced, and renamed.
"""

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anchorembed.system.device import versions
from anchorembed.system.files import whole_folder
from anchorembed.system.processes import on_first_process, rank, reshard, sharded_like, wait_for_all

_log = logging.getLogger(__name__)
Plan = dict[str, Any]  # settings and content hashes that decide a result, by key (`resume_plan`)


def save_checkpoint(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, keep: int, plan: Plan | None = None
) -> None:
    """Write the checkpoint of a step into ``folder`` and delete all but the last ``keep``; all processes must call it.

    It holds whole weights and optimizer state, so any number of processes can continue from it. Random state, schedule
    and the position in the data are not stored: they follow from the ``plan`` and the step (`device.seed_step`).
    """
    parameters = _trainable(module)
    moments = (
        (f"{name}/{key}", value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    )
    tensors = {"weights": on_first_process(parameters.items()), "optimizer": on_first_process(moments)}
    if rank() == 0:
        target, state = folder / f"step-{step:06d}", {"step": step, "plan": plan, "versions": versions()}
        with whole_folder(target) as partial:
            for name, content in tensors.items():
                save_file({key: value.contiguous() for key, value in content.items()}, partial / f"{name}.safetensors")
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        newest_first = checkpoints(folder)
        index = newest_first.index(target)
        # newer ones are damaged: training resumed from an older one
        for path in newest_first[:index] + newest_first[index + keep :]:
            shutil.rmtree(path)
    wait_for_all()


def read_plan(folder: Path) -> Plan | None:
    """The plan in the newest checkpoint that can be read; None without one."""
    for path in checkpoints(folder):
        with suppress(OSError, ValueError, AttributeError):
            plan: Plan | None = json.loads((path / "state.json").read_text(encoding="utf-8")).get("plan")
            return plan
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest undamaged checkpoint; a warning names each damaged one.

    A warning also names libraries of other versions than the checkpoint's: results may then differ in their last bits.

    Returns:
        The step reached, 0 if there is no checkpoint.
    """
    if rank() == 0:
        for unfinished in folder.glob(".step-*"):
            shutil.rmtree(unfinished)
    for path in checkpoints(folder):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            step, before, now = int(state["step"]), dict(state.get("versions", {})), versions()
            tensors = {name: load_file(path / f"{name}.safetensors") for name in ("weights", "optimizer")}
            _restore(module, optimizer, tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _warn("%s: damaged (%s); using the one before.", path, error)
            continue
        changed = [f"{name} {before[name]}, now {now.get(name)}" for name in before if before[name] != now.get(name)]
        if changed:
            _warn("%s: written with %s. Going on may differ in the last bits.", path, "; ".join(changed))
        return step
    return 0


def _warn(message: str, *values: object) -> None:
    """Warn, in the first process only."""
    if rank() == 0:
        _log.warning(message, *values)


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, dict[str, Tensor]]) -> None:
    parameters = _trainable(module)
    if set(parameters) != set(tensors["weights"]):
        raise ValueError("its weights are not this model's")
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in tensors["optimizer"].items():
        name, moment = key.rsplit("/", 1)
        moments[name][moment] = value
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sharded_like(tensors["weights"][name], parameter))
            optimizer.state[parameter] = {
                key: sharded_like(value, parameter) if value.ndim else value.to(parameter.device)
                for key, value in moments[name].items()
            }


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that train, as the optimizer knows them."""
    reshard(module)
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
