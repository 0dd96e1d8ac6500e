"""The loop over a stage's steps: schedule, clipping, checkpoints, log, evaluation, signals, resuming.

What a step computes is the stage's; the loop calls it.
"""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from anchorembed.config import Schedule
from anchorembed.errors import LESS_MEMORY, InputError, OutOfMemory, first_line, memory_ended
from anchorembed.system.device import peak_memory, seed_step
from anchorembed.system.files import to_json, write_file
from anchorembed.system.processes import anywhere, processes, rank, wait, whole
from anchorembed.system.progress import metrics_note, progress_bar
from anchorembed.train.checkpoint import Plan, load_checkpoint, save_checkpoint
from anchorembed.train.stage import Measured, Metrics, read_back

Batch = TypeVar("Batch")

_log = logging.getLogger(__name__)

BEST = "best"  # folder of the best evaluation's checkpoint while a stage runs


class Interrupted(Exception):
    """Training was asked to stop; run again, it goes on from its last checkpoint. ``signal`` is the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


@dataclass(frozen=True, slots=True)
class Loop:
    """What ``fit`` needs beside a stage's functions: its schedule, seed and folder, and what errors name."""

    name: str
    schedule: Schedule
    seed: int
    folder: Path
    lines_of: Callable[[Sequence[int]], str]  # sources and lines of pairs
    plan: Plan  # what decides the result
    less_memory: str = LESS_MEMORY  # what to do where memory ends


def make_optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW over the float32 weights that train, in one pass."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the decay to zero after the last step."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return schedule.learning_rate
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    factor = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.learning_rate * factor


def fit(
    loop: Loop,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    make_batch: Callable[[int, list[int]], tuple[Batch, Metrics]],
    run: Callable[[Batch], Measured],
    order: Callable[[int], Iterator[list[int]]],
    evaluate: Callable[[], Metrics],
) -> None:
    """Run the steps of a stage, from the last checkpoint if there is one.

    Args:
        loop: schedule, seed and folder.
        module: its trainable weights are trained.
        optimizer: of those weights.
        accelerator: for its trackers.
        make_batch: makes the batch of a step's pairs and says what the step costs; called in a thread, a step ahead.
        run: accumulates the gradients of a batch.
        order: indices of each step's pairs, from a given step on.
        evaluate: called every ``evaluate_every`` steps and after the last, on held-out pairs.

    Raises:
        InputError: if a loss or gradient is not finite, a checkpoint cannot be written, or memory ends: what the steps
            before have made is kept.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    schedule, checkpoints = loop.schedule, loop.folder / "checkpoints"
    device = next(module.parameters()).device
    done = load_checkpoint(checkpoints, module, optimizer)
    if done:
        _log.info("%s: resumed after step %s of %s", loop.name, done, schedule.steps)
    log = loop.folder / "log.jsonl"
    earlier = _kept_log(log, done)
    module.train()
    write_checkpoint = _checkpoint_writer(loop, checkpoints, module, optimizer)
    shown: Metrics = {}
    skipped = sum("skipped" in entry for entry in earlier)
    qualities = _Qualities(schedule, earlier)
    with (
        (log if rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as sink,
        _stop_signals() as stop,
        progress_bar() as bar,
    ):
        task = bar.add_task(loop.name, total=schedule.steps, completed=done, note="")
        last = done if qualities.out_of_patience(device) else schedule.steps
        steps = zip(range(done, last), order(done), strict=False)
        for number, indices, future in one_ahead(make_batch, steps):
            started = time.perf_counter()
            seed_step(loop.seed, number, rank())
            with _within_memory(loop, number, write_checkpoint):
                batch, costs = future.result()
                metrics, is_finite = _updated(optimizer, schedule, learning_rate(number, schedule), run, batch)
                metrics = costs | metrics
            if not is_finite:
                skipped += 1
                _skip(loop, number, indices, metrics, skipped)
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}
            optimizer.zero_grad(set_to_none=False)  # a step's gradients take the last one's place
            done = number + 1
            evaluates = schedule.evaluate_every and (done % schedule.evaluate_every == 0 or done == schedule.steps)
            if evaluates:
                with _within_memory(loop, done, write_checkpoint):
                    metrics |= _evaluated(module, evaluate)
                if qualities.add(metrics, device):
                    save_checkpoint(loop.folder / BEST, done, module, optimizer, 1, loop.plan)
            spent = {"seconds": time.perf_counter() - started, "peak_gb": peak_memory(device) / 1e9}
            _record(sink, accelerator, loop.name, done, metrics | spent)
            shown |= metrics  # so that the last evaluation stays in sight
            bar.update(task, advance=1, note=metrics_note(shown))
            # read once: a signal during the save waits for the next step
            stopping = anywhere(stop.is_set(), device)
            if done % schedule.save_every == 0 or stopping:
                write_checkpoint(done)
            if stopping:
                raise Interrupted(stop.number, f"Stopped after step {done}.")
            if evaluates and qualities.out_of_patience(device):
                _log.info("%s: stopped after step %s, as quality has not risen", loop.name, done)
                break
    if schedule.keep_best:
        _load_best(loop, module, optimizer, qualities.best)


class _Qualities:
    """Qualities of a run's evaluations, in order; those that are undefined do not count."""

    def __init__(self, schedule: Schedule, earlier: Sequence[Metrics]) -> None:
        self.schedule = schedule
        self.values = [entry["quality"] for entry in earlier if "quality" in entry]

    @property
    def best(self) -> float:
        return max(self.values, default=-math.inf)

    def add(self, metrics: Metrics, device: torch.device) -> bool:
        """Note an evaluation; returns whether to keep its weights. What the first process finds decides for all."""
        quality = _rounded(metrics.get("quality", math.nan))  # as the log has it, for a resumed run
        better = anywhere(rank() == 0 and quality > self.best, device)
        if math.isfinite(quality):
            self.values.append(quality)
        return better and self.schedule.keep_best

    def out_of_patience(self, device: torch.device) -> bool:
        """Whether the last ``patience`` evaluations were no better than one before them."""
        if self.schedule.patience is None:
            return False
        waited = len(self.values) - 1 - self.values.index(self.best) if self.values else 0
        return anywhere(rank() == 0 and waited >= self.schedule.patience, device)


def _load_best(loop: Loop, module: nn.Module, optimizer: torch.optim.Optimizer, best: float) -> None:
    """Go back to the weights of the best evaluation."""
    chosen = load_checkpoint(loop.folder / BEST, module, optimizer)
    if chosen:
        _log.info("%s: kept step %s, whose quality is %.4f", loop.name, chosen, best)
    else:
        _log.warning("%s: no evaluation has a defined quality, so the last step is kept", loop.name)


def _updated(
    optimizer: torch.optim.Optimizer, schedule: Schedule, rate: float, run: Callable[[Batch], Measured], batch: Batch
) -> tuple[Metrics, bool]:
    """Run a step and update the weights, unless its loss or gradient is not finite: its metrics, and whether it is."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    measured = run(batch)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = whole(nn.utils.clip_grad_norm_(parameters, schedule.max_gradient_norm))
    metrics = read_back(measured | {"gradient_norm": gradient_norm}) | {"learning_rate": rate}
    is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
    if is_finite:
        optimizer.step()
    return metrics, is_finite


def one_ahead(
    make_batch: Callable[[int, list[int]], tuple[Batch, Metrics]], order: Iterator[tuple[int, list[int]]]
) -> Iterator[tuple[int, list[int], Future[tuple[Batch, Metrics]]]]:
    """Yield each step's number, pairs and future batch, which a thread prepares while the step before runs."""
    with ThreadPoolExecutor(1, "batches") as pool:
        current = None
        for number, indices in order:
            following = (number, indices, pool.submit(make_batch, number, indices))
            if current is not None:
                yield current
            current = following
        if current is not None:
            yield current


def _checkpoint_writer(
    loop: Loop, folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[int], None]:
    """What writes the checkpoint of a step."""
    return lambda done: save_checkpoint(folder, done, module, optimizer, loop.schedule.keep_checkpoints, loop.plan)


@contextmanager
def _within_memory(loop: Loop, done: int, write_checkpoint: Callable[[int], None]) -> Iterator[None]:
    """Where memory ends within, write a checkpoint if this process is alone, and say what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_ended(error):
            raise
        kept = "No step is lost" if not done else "The last checkpoint is kept"
        if done and processes() == 1:
            with suppress(RuntimeError, MemoryError, InputError):
                write_checkpoint(done)
                kept = f"Steps up to {done} are kept"
        why = f"{loop.name}: memory ended after step {done}: {first_line(error)}"
        raise OutOfMemory(f"{why} {loop.less_memory} {kept}.") from error


def _evaluated(module: nn.Module, evaluate: Callable[[], Metrics]) -> Metrics:
    """Evaluate, without dropout."""
    module.eval()
    metrics = evaluate()
    module.train()
    return metrics


class _Stop(threading.Event):
    number = signal.SIGINT


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a flag that is looked at between steps; a second SIGINT stops at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT == stop.number:
            raise KeyboardInterrupt
        stop.number = signal.Signals(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _skip(loop: Loop, number: int, indices: Sequence[int], metrics: Metrics, skipped: int) -> None:
    """Say that a step is left out, or that it is one too many."""
    what = (
        f"{loop.name}: step {number + 1} has loss {metrics['loss']} and gradient norm {metrics['gradient_norm']}, "
        f"which must be finite; its pairs: {loop.lines_of(indices)}."
    )
    if skipped > loop.schedule.skip_steps:
        cure = "Lower the learning rate, set model.precision=float32, or allow some such steps with skip_steps."
        raise InputError(f"{what} {cure}")
    _log.warning("%s Left out, %s of at most %s.", what, skipped, loop.schedule.skip_steps)


def _kept_log(path: Path, done: int) -> list[Metrics]:
    """Drop lines of steps after the checkpoint, which run once more; returns what is left, in all processes."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(path) if entry["step"] <= done]
        write_file(path, "".join(f"{to_json(entry)}\n" for entry in kept))
    wait()
    return read_log(path)


def read_log(log: Path) -> list[Metrics]:
    """Metrics of a stage's steps, from its ``log.jsonl``; a line damaged by a crash is left out."""
    entries: list[Metrics] = []
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _rounded(value: float) -> float:
    """To 6 digits after the point; of what is below 1 to 6 digits that count."""
    return float(f"{value:.6g}") if abs(value) < 1 else round(value, 6)


def _record(sink: TextIO, accelerator: Accelerator, stage: str, step: int, metrics: Metrics) -> None:
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    sink.write(to_json({"step": step, **{name: _rounded(value) for name, value in metrics.items()}}) + "\n")
    sink.flush()
    accelerator.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)
