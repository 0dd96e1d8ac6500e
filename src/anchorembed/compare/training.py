"""Train the stages of an arm, each by a recipe file of its own; a training that was stopped is resumed.

On the CPU each training is a new process of the command line, which frees its memory when it ends; its messages and
progress bar stay visible. On a GPU all trainings run in this process, so that layers are compiled once.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml

from anchorembed.compare.arms import before_recipe, choices, contrast_recipe
from anchorembed.compare.controls import ArmRecipe, train_arm
from anchorembed.compare.plan import Comparison
from anchorembed.compare.records import Run
from anchorembed.errors import LESS_MEMORY, InputError
from anchorembed.model.metadata import METADATA
from anchorembed.system.device import find_device
from anchorembed.system.files import write_file
from anchorembed.train.loop import Interrupted, read_log

_POLL_SECONDS = 0.5  # between checks for a signal


def run_folder(comparison: Comparison, run: Run) -> Path:
    """Folder of the stages of a run's arm and seed."""
    return comparison.recipe.output / comparison.record.key[:8] / f"{run.arm}-{run.digest}" / f"seed-{run.seed}"


def train_before(comparison: Comparison, run: Run) -> Path | None:
    """Train the stage before Stage II of a run's arm; returns the stage's folder, or None if it has none."""
    arm, steps = comparison.arms[run.arm], comparison.arm_record(run.arm).steps
    recipe = before_recipe(comparison.recipe, arm, run.seed, steps, run_folder(comparison, run) / "before")
    return train_stage(recipe) if recipe else None


def train_stage_two(comparison: Comparison, run: Run, before: Path | None, choice: str) -> Path:
    """Train Stage II from the stage ``before``, or the base model, with a choice of the grid; returns its folder."""
    folder, settings = run_folder(comparison, run) / choice, choices(comparison.recipe)[choice]
    arm, steps = comparison.arms[run.arm], comparison.arm_record(run.arm).steps
    start = str(before / "model") if before else None
    return train_stage(contrast_recipe(comparison.recipe, arm, run.seed, settings, start, steps, folder))


def train_stage(recipe: ArmRecipe) -> Path:
    """Train a recipe of one stage unless its model exists; returns the stage's folder.

    Raises:
        InputError: if the model there has another number of steps than the recipe, or training fails.
        Interrupted: if a signal stopped the training.
    """
    stage_class, settings = recipe.only_stage()
    folder = recipe.output / stage_class.name
    if not (folder / "model" / METADATA).exists():
        _train(recipe)
    steps = read_log(folder / "log.jsonl")[-1]["step"]
    if steps != settings.steps:
        raise InputError(
            f"{folder}: its model was trained for {steps} steps, this comparison asks for {settings.steps}. Remove the "
            "folder."
        )
    return folder


def _train(recipe: ArmRecipe) -> None:
    path = recipe.output / "recipe.yaml"
    write_file(path, yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False))
    if find_device(recipe.model.device).type == "cuda":
        torch.cuda.empty_cache()
        train_arm(recipe)
        return
    command = [sys.executable, "-m", "anchorembed", "train-arm", str(path)]
    with _caught_signals() as caught, subprocess.Popen(command) as process:  # noqa: S603 - ourselves
        code = _wait(process, caught)
    ended_by = code - 128 if code > 128 else -code  # 128 + n if the training handled signal n, else -n
    stopped_by = caught[0] if caught else ended_by
    if stopped_by in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        raise Interrupted(stopped_by, "Stopped.")
    if ended_by == signal.SIGKILL:
        raise InputError(f"{path}: its training was killed, as the system does when memory runs out. {LESS_MEMORY}")
    if code:
        raise InputError(f"{path}: its training ended with exit code {code}. See its message above.")


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Catch SIGINT, SIGTERM and SIGHUP, and list those caught; signals that are ignored, as by nohup, stay so."""
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], caught: Sequence[int]) -> int:
    """Wait for a training and return its exit code; once a signal is caught, SIGTERM has it write a checkpoint and end.

    SIGINT would be wrong: the terminal sends it to the training itself, and a second SIGINT stops it at once.
    """
    while not caught:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_SECONDS)
    process.terminate()
    return process.wait()
