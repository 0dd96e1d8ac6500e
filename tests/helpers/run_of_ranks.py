"""Train a recipe, asked to stop, as by a signal, after its first checkpoint, or sharded.

As a script: everything that test_two_processes.py wants of two processes, so that they are started once.
"""

import logging
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator

from anchorembed.recipe_file import read_recipe
from anchorembed.system.processes import rank
from anchorembed.train import distributed, loop
from anchorembed.train.run import train
from steps_of_ranks import leave_shards, shard_on_cpus, write_steps

real = loop.save_checkpoint


def save_then_stop(folder: Path, *rest: Any, **named: Any) -> None:
    real(folder, *rest, **named)
    if rest[0] == 2:  # the step
        os.kill(os.getpid(), signal.SIGTERM)


def sharding(**named: Any) -> Accelerator:
    accelerator = Accelerator(**named)
    shard_on_cpus(accelerator)
    return accelerator


def train_recipe(path: Path, stop: bool = False, shard: bool = False) -> str:
    """Train both stages; returns what a stopped run says, or nothing."""
    with ExitStack() as changes:
        if stop:
            changes.enter_context(patch.object(loop, "save_checkpoint", save_then_stop))
        if shard:
            changes.enter_context(patch.object(distributed, "Accelerator", sharding))
        try:
            train(read_recipe(path))
        except loop.Interrupted as stopped:
            return str(stopped)
    return ""


def main() -> None:
    """Steps and runs by DDP, then sharded, in a folder of models and recipes; what stopped runs say goes to stderr."""
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    for how, runs in (("ddp", {"two-one": True}), ("shard", {"sharded": False, "shards-one": True})):
        write_steps(folder, folder / how, shard=how == "shard")
        for name, stop in runs.items():
            message = train_recipe(folder / f"{name}.yaml", stop, shard=how == "shard")
            if rank() == 0:
                sys.stderr.write(f"{name}: {message}\n")
    (folder / f"finished-{rank()}").touch()
    leave_shards()


if __name__ == "__main__":
    main()
