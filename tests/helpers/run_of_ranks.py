"""Run by test_distributed.py: train a recipe, asked to stop, as by a signal, after its first checkpoint, or sharded."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from anchorembed.config import read_recipe
from anchorembed.system.processes import leave
from anchorembed.train import loop, together
from anchorembed.train import run as training
from steps_of_ranks import leave_shards, shard_on_cpus

real = loop.save_checkpoint


def save_then_stop(folder: Path, *rest: Any, **named: Any) -> None:
    real(folder, *rest, **named)
    if rest[0] == 2:  # the step
        os.kill(os.getpid(), signal.SIGTERM)


def sharding(**named: Any) -> Accelerator:
    accelerator = Accelerator(**named)
    if accelerator.num_processes > 1:
        shard_on_cpus(accelerator)
    return accelerator


if __name__ == "__main__":
    recipe, stop, shard = sys.argv[1], "stop" in sys.argv, "shard" in sys.argv
    if stop:
        loop.save_checkpoint = save_then_stop
    if shard:
        together.Accelerator = sharding
    try:
        logging.basicConfig(level=logging.INFO)
        training.train(read_recipe(recipe))
    except loop.Interrupted as stopped:
        sys.stderr.write(str(stopped))
    if shard:
        leave_shards()
    leave()
