"""Kill a training run at random moments until it has been killed often enough, let it finish, compare its weights.

``python tests/helpers/survivor.py 200`` is the long version of what test_survival.py does with 20 kills. A run is a
fork of this process, which has imported what it needs and trains nothing itself: so a start takes no seconds.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkContext
from pathlib import Path

import torch
from safetensors.torch import load_file

from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.prepare import prepare
from anchorembed.train.run import train
from tiny import recipe_values, save_tiny, write_pairs

STEPS = 30


@dataclass(frozen=True)
class Survived:
    """What happened: kills, how many of them while a checkpoint was being written, and whether weights are equal."""

    kills: int
    while_writing: int
    equal: bool


def recipe(folder: Path, output: str, steps: int) -> Recipe:
    """Both stages on a tiny model, with LoRA's dropout and cached gradients, a checkpoint every step."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs, 120)
        save_tiny(folder / "model")
    stage = {"steps": steps, "batch_size": 8, "warmup_steps": 2, "save_every": 1, "evaluate_every": 0}
    stages = {
        "reconstruct": stage,
        "contrast": stage | {"tokens_per_micro_batch": 100, "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
    }
    return parse_recipe(recipe_values(pairs, folder / "model", folder / output, held_out=0) | stages)


def survive(folder: Path, kills: int, steps: int = STEPS, seed: int = 0) -> Survived:
    """Train once undisturbed and once killed ``kills`` times, at the next step or as the next checkpoint is begun."""
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    context = multiprocessing.get_context("fork")
    expected, run = recipe(folder, "whole", steps), recipe(folder, "killed", steps)
    prepare(expected, expected.model.name)  # imports what the first use imports, and converts the pairs
    finish(context, expected)
    rng, done, while_writing = random.Random(seed), 0, 0
    while done < kills:
        process = context.Process(target=train, args=(run,))
        process.start()
        time.sleep(rng.uniform(0.0, 0.3))
        writing = wait_for_progress(run, process, beginning=rng.random() < 0.5)
        time.sleep(0.0 if writing else rng.uniform(0.0, 0.02))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        done += 1
        while_writing += any(run.output.glob("*/checkpoints/.*")) or any(run.output.glob("*/.*"))
    finish(context, run)
    first, second = (load_file(one.output / "contrast" / "model" / "model.safetensors") for one in (expected, run))
    equal = set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    return Survived(done, while_writing, equal)


def finish(context: ForkContext, run: Recipe) -> None:
    """Train to the end, undisturbed."""
    process = context.Process(target=train, args=(run,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with exit code {process.exitcode}")


def wait_for_progress(run: Recipe, process: multiprocessing.process.BaseProcess, beginning: bool) -> bool:
    """Until a checkpoint is complete that was not there, or, with ``beginning``, one is being written."""
    before = set(run.output.glob("*/checkpoints/step-*"))
    while process.is_alive():
        if beginning and any(run.output.glob("*/checkpoints/.*")):
            return True
        if set(run.output.glob("*/checkpoints/step-*")) - before:
            return False
        time.sleep(0.001)
    return False


def main() -> None:
    """Print what happened; exit code 1 if the weights differ."""
    parser = argparse.ArgumentParser(description="Kill a training run at random moments; its result must not differ.")
    parser.add_argument("kills", type=int)
    parser.add_argument("--steps", type=int, help="steps of each stage (default: enough for the kills)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = survive(Path(folder), args.kills, args.steps or max(STEPS, 2 * args.kills), args.seed)
    sys.stdout.write(f"{json.dumps(asdict(found))}\n")
    sys.exit(0 if found.equal else 1)


if __name__ == "__main__":
    main()
