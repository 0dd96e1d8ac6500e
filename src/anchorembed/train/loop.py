"""The loop over a stage's steps: schedule, clipping, checkpoints, log, evaluation, signals, resuming."""

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from anchorembed.errors import LESS_MEMORY, InputError, OutOfMemory, first_line, memory_ended
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Schedule
from anchorembed.system.device import peak_memory, seed_step, wait_for
from anchorembed.system.files import to_json, write_file
from anchorembed.system.processes import full_tensor, in_any_process, processes, rank, wait_for_all
from anchorembed.system.progress import metrics_note, progress_bar
from anchorembed.train.checkpoint import Plan, checkpoints, load_checkpoint, save_checkpoint
from anchorembed.train.optimizer import learning_rate
from anchorembed.train.stage import Measured, Metrics, Stage, read_back, step

Batch = TypeVar("Batch")

_log = logging.getLogger(__name__)

BEST = "best"  # folder of the best evaluation's checkpoint while a stage runs
_NOT_EVALUATED = "not_evaluated"  # in the log of a step in whose evaluation memory ended


class Interrupted(Exception):
    """Training was stopped by the signal ``signal``; the next run resumes from the last checkpoint."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class Stop(threading.Event):
    """Set by a signal, ``number``."""

    number = signal.SIGINT


@dataclass(frozen=True, slots=True)
class Loop:
    """Settings of a stage's loop.

    Attributes:
        name: of the stage, for logs and errors.
        schedule: steps, learning rate, checkpoints, evaluations.
        seed: of dropout.
        folder: for log and checkpoints.
        lines_of: sources and lines of pairs, for errors.
        plan: settings that decide the result, stored in checkpoints.
        less_memory: advice for the error when memory ends.
        stop: of `stop_signals`, checked after each step.
    """

    name: str
    schedule: Schedule
    seed: int
    folder: Path
    lines_of: Callable[[Sequence[int]], str]
    plan: Plan
    less_memory: str = LESS_MEMORY
    stop: Stop = field(default_factory=Stop)


def whole_step(stage: Stage, optimizer: torch.optim.Optimizer, number: int, pairs: Sequence[TokenPair]) -> Metrics:
    """Run one step, update the weights as `fit` does, and wait for the device, so that the step can be measured."""
    metrics = step(stage, number, pairs)
    nn.utils.clip_grad_norm_(stage.module.parameters(), stage.settings.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    wait_for(stage.embedder.device)
    return metrics


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
        make_batch: returns the batch of a step's pairs and the step's costs; called in a thread, a step ahead.
        run: accumulates the gradients of a batch.
        order: indices of each step's pairs, from a given step on.
        evaluate: called every ``evaluate_every`` steps and after the last, on held-out pairs.

    Raises:
        InputError: if a loss or gradient is not finite, a checkpoint cannot be written, or memory ends; earlier steps
            are kept.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    schedule, log = loop.schedule, loop.folder / "log.jsonl"
    done = load_checkpoint(loop.folder / "checkpoints", module, optimizer)
    if done:
        _log.info("%s: resumed after step %s of %s", loop.name, done, schedule.steps)
    entries = [entry for entry in read_log(log) if entry["step"] <= done]  # later steps are repeated
    _write_log(log, entries)
    training = _Training(loop, module, optimizer, entries)
    shown: Metrics = {}
    if entries and _NOT_EVALUATED in entries[-1]:
        evaluated = _loggable(training.evaluate(done, evaluate))
        entries[-1] = {name: value for name, value in entries[-1].items() if name != _NOT_EVALUATED} | evaluated
        _write_log(log, entries)
        _track(accelerator, loop.name, done, evaluated)
    module.train()
    with (log if rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as sink, progress_bar() as bar:
        task = bar.add_task(loop.name, total=schedule.steps, completed=done, note="")
        last = done if training.out_of_patience() else schedule.steps
        steps = zip(range(done, last), order(done), strict=False)
        for number, indices, future in one_ahead(make_batch, steps):
            started, done = time.perf_counter(), number + 1
            metrics = training.step(number, indices, future, run)
            record = partial(_record, sink, training.device, started, done)
            every = schedule.evaluate_every
            evaluates = every > 0 and (done % every == 0 or done == schedule.steps)
            if evaluates:
                metrics |= training.evaluate(done, evaluate, partial(record, metrics | {_NOT_EVALUATED: 1.0}))
            _track(accelerator, loop.name, done, record(metrics))
            shown |= metrics  # the last evaluation stays visible
            bar.update(task, advance=1, note=metrics_note(shown))
            # read once: a signal during the save waits for the next step
            stopping = in_any_process(loop.stop.is_set(), training.device)
            if done % schedule.save_every == 0 or stopping:
                training.save(done)
            if stopping:
                raise Interrupted(loop.stop.number, f"Stopped after step {done}.")
            if evaluates and training.out_of_patience():
                _log.info("%s: stopped after step %s, as quality has not risen", loop.name, done)
                break
    if schedule.keep_best:
        training.load_best()


class _Training:
    """Steps, evaluations and checkpoints of a stage; ``log`` has the metrics of the steps before a resumed run."""

    def __init__(self, loop: Loop, module: nn.Module, optimizer: torch.optim.Optimizer, log: Sequence[Metrics]) -> None:
        self.loop, self.module, self.optimizer = loop, module, optimizer
        self.device = next(module.parameters()).device
        self._skipped = sum("skipped" in entry for entry in log)
        self._qualities = [entry["quality"] for entry in log if "quality" in entry]  # defined ones, in order

    def save(self, done: int) -> None:
        """Write the checkpoint of a step."""
        keep = self.loop.schedule.keep_checkpoints
        save_checkpoint(self.loop.folder / "checkpoints", done, self.module, self.optimizer, keep, self.loop.plan)

    def step(
        self,
        number: int,
        indices: Sequence[int],
        future: Future[tuple[Batch, Metrics]],
        run: Callable[[Batch], Measured],
    ) -> Metrics:
        """Run a step and update the weights; a step whose loss or gradient is not finite is skipped."""
        seed_step(self.loop.seed, number, rank())
        rate = learning_rate(number, self.loop.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        with self._within_memory(number):
            batch, costs = future.result()
            measured = run(batch)
            gradient_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, self.loop.schedule.max_gradient_norm))
            metrics = costs | read_back(measured | {"gradient_norm": gradient_norm}) | {"learning_rate": rate}
            if _is_finite(metrics):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the next step's gradients use the same memory
        if _is_finite(metrics):
            return metrics
        self._skip(number, indices, metrics)
        return {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}

    def _skip(self, number: int, indices: Sequence[int], metrics: Metrics) -> None:
        """Warn that a step is left out; raise InputError if more than ``skip_steps`` are."""
        self._skipped += 1
        most = self.loop.schedule.skip_steps
        problem = (
            f"{self.loop.name}: step {number + 1} has loss {metrics['loss']} and gradient norm "
            f"{metrics['gradient_norm']}, which must be finite; its pairs: {self.loop.lines_of(indices)}."
        )
        if self._skipped > most:
            cure = (
                "Allow some such steps with skip_steps; or train into another output with a lower learning rate or "
                "model.precision=float32."
            )
            raise InputError(f"{problem} {cure}")
        _log.warning("%s Left out, %s of at most %s.", problem, self._skipped, most)

    def evaluate(
        self, done: int, evaluate: Callable[[], Metrics], record_step: Callable[[], object] = lambda: None
    ) -> Metrics:
        """Evaluate without dropout, and keep the weights if they are the best so far and the schedule asks for it.

        ``record_step`` is called where memory ends, before the checkpoint is written.
        """
        with self._within_memory(done, record_step):
            self.module.eval()
            metrics = evaluate()
            self.module.train()
        quality = _rounded(metrics.get("quality", math.nan))  # as the log has it, for a resumed run
        is_better = in_any_process(rank() == 0 and quality > self._best, self.device)  # the first process decides
        if math.isfinite(quality):
            self._qualities.append(quality)
        if is_better and self.loop.schedule.keep_best:
            save_checkpoint(self.loop.folder / BEST, done, self.module, self.optimizer, 1, self.loop.plan)
        return metrics

    @property
    def _best(self) -> float:
        return max(self._qualities, default=-math.inf)

    def out_of_patience(self) -> bool:
        """Whether none of the last ``patience`` evaluations was better than the best one before them."""
        patience = self.loop.schedule.patience
        if patience is None:
            return False
        waited = len(self._qualities) - 1 - self._qualities.index(self._best) if self._qualities else 0
        return in_any_process(rank() == 0 and waited >= patience, self.device)

    def load_best(self) -> None:
        """Go back to the weights of the best evaluation."""
        step = load_checkpoint(self.loop.folder / BEST, self.module, self.optimizer)
        if step:
            _log.info("%s: kept step %s, whose quality is %.4f", self.loop.name, step, self._best)
        else:
            _log.warning("%s: no evaluation has a defined quality, so the last step is kept", self.loop.name)

    @contextmanager
    def _within_memory(self, done: int, record_step: Callable[[], object] = lambda: None) -> Iterator[None]:
        """If memory ends in this block, write a checkpoint (in a single process), and raise OutOfMemory with advice."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not memory_ended(error):
                raise
            kept = "No step is lost"
            if done:
                saved = checkpoints(self.loop.folder / "checkpoints")
                kept = "The last checkpoint is kept" if saved else "There is no checkpoint yet: it begins at step 1"
            if done and processes() == 1:
                with suppress(RuntimeError, MemoryError, InputError):
                    record_step()
                    self.save(done)
                    kept = f"Steps up to {done} are kept"
            why = f"{self.loop.name}: memory ended after step {done}: {first_line(error)}"
            raise OutOfMemory(f"{why} {self.loop.less_memory} {kept}.") from error


def _is_finite(metrics: Metrics) -> bool:
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])


def one_ahead(
    make_batch: Callable[[int, list[int]], tuple[Batch, Metrics]], order: Iterator[tuple[int, list[int]]]
) -> Iterator[tuple[int, list[int], Future[tuple[Batch, Metrics]]]]:
    """Yield each step's number, pairs and future batch, which a thread prepares while the step before runs."""
    with ThreadPoolExecutor(1, "batches") as pool:
        submitted = ((number, indices, pool.submit(make_batch, number, indices)) for number, indices in order)
        current = next(submitted, None)
        while current is not None:
            following = next(submitted, None)
            yield current
            current = following


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a flag, checked after steps and stages; a second SIGINT stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT == stop.number:
            raise KeyboardInterrupt
        stop.number = signal.Signals(number)
        stop.set()

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _write_log(path: Path, entries: Sequence[Metrics]) -> None:
    """Write the log of all steps so far, in the first process; the others wait."""
    if rank() == 0:
        write_file(path, "".join(f"{to_json(entry)}\n" for entry in entries))
    wait_for_all()


def read_log(log: Path) -> list[Metrics]:
    """Metrics of a stage's steps, from its ``log.jsonl``; a line damaged by a crash is left out."""
    entries: list[Metrics] = []
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _rounded(value: float) -> float:
    """Round to 6 decimal places, or below 1 to 6 significant digits."""
    return float(f"{value:.6g}") if abs(value) < 1 else round(value, 6)


def _record(sink: TextIO, device: torch.device, started: float, step: int, metrics: Metrics) -> Metrics:
    """Write a step's line, with its seconds and peak memory; returns its metrics as written."""
    spent = {"seconds": time.perf_counter() - started, "peak_gb": peak_memory(device) / 1e9}
    written = _loggable(metrics | spent)
    sink.write(to_json({"step": step, **written}) + "\n")
    sink.flush()
    return written


def _loggable(metrics: Metrics) -> Metrics:
    """The finite metrics, rounded."""
    return {name: _rounded(value) for name, value in metrics.items() if math.isfinite(value)}


def _track(accelerator: Accelerator, stage: str, step: int, metrics: Metrics) -> None:
    """Send a step's metrics to the trackers."""
    accelerator.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)
