"""Shared by the benchmarks: options, real pairs, sides in processes of their own that take turns, printed results.

Each side of a benchmark, such as ours or sentence-transformers', runs in its own process, so that peak memory is
measured by side. The sides take turns on the same batches, in an order that flips every step. A ratio is the median
over the steps of the ratio within a step: both sides compute the same texts within minutes, so that a busy or throttled
machine slows both.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pkgutil
import platform
import random
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from anchorembed.curate.harvest import harvest_docstrings
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.errors import InputError
from anchorembed.export.run import export
from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.load import default_model_folder
from anchorembed.model.metadata import read_metadata
from anchorembed.model.template import bake, derive_template
from anchorembed.model.tokens import Lengths, PairTokenizer
from anchorembed.system.device import peak_memory
from anchorembed.system.files import cache_folder
from anchorembed.system.progress import progress_bar

GIGABYTE = 1e9
_OUT_OF_MEMORY_CODES = (-9, -6)  # killed by the kernel; aborted by C++ code whose allocation failed

T = TypeVar("T")
Batch = Sequence[TextPair] | Sequence[str] | Sequence[int]
Step = Callable[[Any], dict[str, Any]]


# --- Options and the machine -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """A command line option: its default, its help text, and its type where the default does not tell it."""

    default: Any
    help: str
    kind: type | None = None


_COMMON = {
    "data": Option(
        os.environ.get("ANCHOREMBED_DATA"),
        "folder with train/*.jsonl.gz; without it, docstrings of installed packages",
        Path,
    ),
    "model": Option(DEFAULT_MODEL, f"{DEFAULT_MODEL}, a hub id or a folder"),
    "steps": Option(5, "measured steps", int),
    "warmup": Option(2, "steps before the measured ones", int),
    "cut": Option(256, "longest text in tokens, template included", int),
    "batch": Option(32, "pairs a step", int),
    "threads": Option(2, "CPU threads of each side"),
    "seed": Option(0, "seed of the choice and order of texts"),
    "out": Option(None, "file to append a JSON line to for each step of each side", Path),
}


BY_TASK = Option(False, "draw all pairs of a step from one file")  # for scripts that call draw_batches


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse the options that all benchmarks share, and a script's own.

    A keyword gives a shared option another default, or adds an option. Its value is a default or an ``Option``.
    """
    parser = argparse.ArgumentParser(description=description)
    options = dict(_COMMON)
    for name, value in defaults.items():
        options[name] = (
            value if isinstance(value, Option) else replace(options.get(name, Option(None, "")), default=value)
        )
    for name, option in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", help=option.help)
            continue
        kind = option.kind or type(option.default)
        default = kind(option.default) if option.default is not None else None
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(flag, type=kind, default=default, help=option.help + shown)
    args = parser.parse_args()
    for name, least in (("steps", 1), ("warmup", 0), ("batch", 1), ("cut", 8), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}: {value} is too small. Give at least {least}.")
    return args


def print_machine(args: argparse.Namespace) -> None:
    """Print the command, the machine and the versions."""
    features = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    memory = psutil.virtual_memory()
    print(f"command: python {shlex.join(sys.argv)}")
    print(f"machine: {_cpu()} ({', '.join(features) or 'no bf16 products'}), {args.threads} of {os.cpu_count()} CPUs")
    print(f"memory:  {memory.available / GIGABYTE:.1f} GB free of {memory.total / GIGABYTE:.1f} GB")
    print(f"torch {torch.__version__}, Python {platform.python_version()}", flush=True)


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# --- Pairs -----------------------------------------------------------------------------------------------------------


def pairs_by_task(args: argparse.Namespace) -> dict[str, list[TextPair]]:
    """Pairs by task, without hard negatives: those of the data folder, or docstrings of the installed packages."""
    if args.data is None:
        files = [_docstrings()]
    else:
        files = sorted((args.data / "train").glob("*.jsonl.gz"))
        if not files:
            raise InputError(
                f"{args.data}: no train/*.jsonl.gz there. Name a folder that has them, or leave out --data."
            )
    return {
        file.name.removesuffix(".gz").removesuffix(".jsonl"): [replace(pair, negatives=()) for pair in read_pairs(file)]
        for file in files
    }


def _docstrings() -> Path:
    with progress_bar() as bar:
        task = bar.add_task("reading packages", total=None, note="")
        return harvest_docstrings(
            cache_folder() / "benchmarks" / "docstrings",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        ).train


def draw_batches(args: argparse.Namespace, count: int) -> list[list[TextPair]]:
    """``count`` batches of ``args.batch`` pairs, the same for the same seed.

    A batch is a uniform sample of all pairs, in their natural mix of lengths. With ``--by-task`` it is a sample of the
    pairs of one task, and tasks are drawn in proportion to their sizes.
    """
    tasks = list(pairs_by_task(args).values())
    groups = [pairs for pairs in tasks if len(pairs) >= args.batch] if args.by_task else [[*chain(*tasks)]]
    if not groups or len(groups[0]) < args.batch:
        raise InputError(f"--batch: {args.batch} is more than there are pairs to draw from. Lower it.")
    generator = random.Random(args.seed)
    drawn_groups = generator.choices(groups, weights=[len(group) for group in groups], k=count)
    return [generator.sample(group, args.batch) for group in drawn_groups]


def draw_texts(args: argparse.Namespace, count: int) -> list[str]:
    """``count`` texts, queries and documents in their natural mix of lengths, the same for the same seed."""
    pairs = chain(*pairs_by_task(args).values())
    all_texts = [text for pair in pairs for text in (pair.query, pair.positive)]
    if len(all_texts) < count:
        raise InputError(f"--texts: {count} are needed, warm-up included, and there are {len(all_texts)}. Lower it.")
    return random.Random(args.seed).sample(all_texts, count)


@cache
def pair_tokenizer(model: str, cut: int) -> PairTokenizer:
    """The model's tokenizer with the template baked in, cutting both sides at ``cut`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(model))
    saved = read_metadata(Path(model))
    return PairTokenizer(bake(tokenizer, saved.template if saved else derive_template(tokenizer)), Lengths(cut, cut))


def model_source(model: str) -> str:
    """The name or folder by which transformers loads a model."""
    return str(default_model_folder()) if model == DEFAULT_MODEL else model


def text_tokens(args: argparse.Namespace, batch: Batch) -> int:
    """Tokens of a batch's texts after cutting, without template, so that sides count alike; 0 if it has no texts."""
    if not all(isinstance(item, str | TextPair) for item in batch):
        return 0
    texts = [text for item in batch for text in ((item,) if isinstance(item, str) else (item.query, item.positive))]
    return sum(map(len, pair_tokenizer(args.model, args.cut).plain(texts, args.cut)))


def exported_folder(model: str) -> Path:
    """Folder of the model's export for sentence-transformers, which the first call writes, in a process of its own."""
    weights = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    contents = [model, *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in weights)]
    digest = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:12]
    folder = cache_folder() / "benchmarks" / f"export-{digest}"
    if not folder.exists():
        print(f"exporting {model} for sentence-transformers: {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(export, model, folder).result()
    return folder


# --- Sides -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step of one side: wall time, tokens of its texts, peak memory of its process so far, what it returned."""

    seconds: float
    tokens: int
    peak_bytes: int
    extra: dict[str, Any]


class SideDied(Exception):
    """A side's process failed or was killed; ``out_of_memory`` if memory ran out."""

    def __init__(self, side: str, reason: str, out_of_memory: bool) -> None:
        super().__init__(f"{side}: {'out of memory: ' if out_of_memory else ''}{reason}")
        self.side, self.reason, self.out_of_memory = side, reason, out_of_memory


@dataclass(frozen=True, slots=True)
class _Answer:
    seconds: float
    peak_bytes: int
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    out_of_memory: bool


class Side:
    """One side of a benchmark in a process of its own; use it in a ``with`` statement, which ends the process.

    ``factory`` builds, in that process, the function that runs one step on a batch. Given as ``"module:function"``, its
    module is imported by that process alone.

    Raises:
        SideDied: if the process fails or is killed, here or in ``step``.
    """

    def __init__(self, name: str, args: argparse.Namespace, factory: str | Callable[..., Step], *values: Any) -> None:
        self.name, self.peak_bytes = name, 0
        self._args = args
        for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # read by the new process as it starts
            os.environ[variable] = str(args.threads)
        context = multiprocessing.get_context("spawn")
        self._pipe, process_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(process_end, args, factory, values), name=name)
        self._process.start()
        process_end.close()
        self._receive()

    def step(self, batch: Batch) -> StepResult:
        """Run one step; only the side's own work is timed."""
        tokens = text_tokens(self._args, batch)
        with suppress(BrokenPipeError):  # _receive reports why the process ended
            self._pipe.send(batch)
        answer = self._receive()
        self.peak_bytes = answer.peak_bytes
        return StepResult(answer.seconds, tokens, answer.peak_bytes, answer.extra)

    def _receive(self) -> _Answer:
        wait([self._pipe, self._process.sentinel])
        answer: _Answer | _Failure | None = None
        with suppress(EOFError, ConnectionResetError):
            answer = self._pipe.recv() if self._pipe.poll() else None
        if isinstance(answer, _Answer):
            return answer
        self.close()
        if answer is None:
            code = self._process.exitcode
            answer = _Failure(f"its process ended with exit code {code}", out_of_memory=code in _OUT_OF_MEMORY_CODES)
        raise SideDied(self.name, answer.reason, answer.out_of_memory)

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    pipe: Connection, args: argparse.Namespace, factory: str | Callable[..., Step], values: tuple[Any, ...]
) -> None:
    """Build the step and run it on each batch received, until None is received or the pipe is closed."""
    _guard_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        build = pkgutil.resolve_name(factory) if isinstance(factory, str) else factory
        step = build(*values)
        pipe.send(_Answer(0.0, peak_memory(torch.device("cpu")), {}))
        while (batch := pipe.recv()) is not None:
            started = time.perf_counter()
            extra = step(batch)
            seconds = time.perf_counter() - started
            pipe.send(_Answer(seconds, peak_memory(torch.device("cpu")), extra))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:  # whatever a side's library raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send(_Failure(reason, isinstance(error, MemoryError) or "memory" in reason.lower()))


def _guard_memory() -> None:
    """On Linux, limit this process to the memory that is free now, and have the kernel kill it first if memory ends."""
    if sys.platform != "linux":
        return
    with suppress(OSError, ValueError):
        free = psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def run_in_turns(
    sides: Sequence[Side], batches: Sequence[Batch], warmup: int, out: Path | None = None
) -> dict[str, list[StepResult]]:
    """Run each batch once on each side, the order flipped every step.

    Args:
        sides: those that take turns.
        batches: one for each step.
        warmup: number of first steps that are left out of the results.
        out: file to append a JSON line to after each step of each side.

    Returns:
        The measured steps of each side by its name.
    """
    results: dict[str, list[StepResult]] = {side.name: [] for side in sides}
    with progress_bar() as bar:
        task = bar.add_task("steps", total=len(batches) * len(sides), note="")
        for number, batch in enumerate(batches):
            for side in sides if number % 2 == 0 else reversed(sides):
                bar.update(task, note=f"step {number + 1} of {len(batches)}, {side.name}")
                step = side.step(batch)
                bar.update(task, advance=1)
                _append_line(
                    out, {"side": side.name, "step": number, "warmup": number < warmup, "items": len(batch)}, step
                )
                if number >= warmup:
                    results[side.name].append(step)
    return results


def halve_until_it_fits(args: argparse.Namespace, side: str, measure: Callable[[], T]) -> tuple[T, list[int]]:
    """Measure; while ``side`` runs out of memory, halve ``args.batch`` for both sides and print so.

    Returns:
        What ``measure`` returned, and the batch sizes that did not fit.
    """
    did_not_fit: list[int] = []
    while True:
        try:
            return measure(), did_not_fit
        except SideDied as error:
            if error.side != side or not error.out_of_memory or args.batch == 1:
                raise
            print(f"batch {args.batch} does not fit: {error}. Halved.", flush=True)
            did_not_fit.append(args.batch)
            args.batch //= 2


def _append_line(out: Path | None, labels: dict[str, Any], step: StepResult) -> None:
    if out is None:
        return
    line = {"benchmark": Path(sys.argv[0]).stem, **labels}
    line |= {"seconds": step.seconds, "tokens": step.tokens, "peak_bytes": step.peak_bytes}
    line |= {name: value for name, value in step.extra.items() if isinstance(value, int | float | str)}
    with out.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(line) + "\n")


# --- Figures ---------------------------------------------------------------------------------------------------------


def median_rate(steps: Iterable[StepResult], items: int | None = None) -> float:
    """Median over the steps of tokens a second, or of ``items`` a second."""
    return statistics.median((items or step.tokens) / step.seconds for step in steps)


def median_speedup(ours: Iterable[StepResult], theirs: Iterable[StepResult]) -> float:
    """Median over the steps of their seconds over ours, for the same texts."""
    return statistics.median(their.seconds / our.seconds for our, their in zip(ours, theirs, strict=True))


def peak_gb(steps: Sequence[StepResult]) -> float:
    """Peak memory of a side's process, in GB."""
    return steps[-1].peak_bytes / GIGABYTE


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: labels in the first column, figures in the others."""
    printed = Table()
    for number, column in enumerate(columns):
        printed.add_column(column, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*row)
    print(f"\n{title}")
    Console(width=None if sys.stdout.isatty() else 120).print(printed)


def print_result(**figures: Any) -> None:
    """Print the last line of a benchmark: ``RESULT`` and its figures as JSON."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
    print(f"RESULT {json.dumps(rounded)}", flush=True)


def run_benchmark(main: Callable[[], None]) -> None:
    """Run a benchmark; an InputError, or the end of a side's process, is printed and ends it with exit code 2."""
    try:
        main()
    except (InputError, SideDied) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
