"""Run by test_distributed.py: train a recipe, asked to stop, as by a signal, after its first checkpoint."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from anchorembed import training
from anchorembed.config import read_recipe

real = training.save_checkpoint


def save_then_stop(folder: Path, *rest: Any, **named: Any) -> None:
    real(folder, *rest, **named)
    if rest[0] == 2:  # the step
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    training.save_checkpoint = save_then_stop
    try:
        training.reconstruct(read_recipe(sys.argv[1]))
    except training.Interrupted as stop:
        sys.stderr.write(str(stop))
