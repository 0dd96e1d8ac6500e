"""Profile a recipe on this machine: tokens a second, memory, share of peak FLOP/s, time by kind of work."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch.profiler import ProfilerActivity

from anchorembed.errors import LESS_MEMORY, InputError
from anchorembed.model.compile_layers import compile_layers
from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.system.device import peak_memory, wait_for
from anchorembed.train.loop import whole_step
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.prepare import prepare
from anchorembed.train.run import STAGES, plan_memory
from anchorembed.train.stage import StageName

_KINDS = {  # kind of work -> parts of an operation's name in torch's profiler; the first match counts
    "matrix products": ("mm", "matmul", "linear", "convolution"),
    "optimizer": ("adam", "optimizer", "_foreach", "clip_grad"),
    "copies, gathers, sums of gradients": ("copy", "index", "cat", "zero", "fill", "add_", "AccumulateGrad", "empty"),
}
_LONG_PRODUCT = 0.1  # seconds
_OTHER = "fused and other element-wise work"


@dataclass(frozen=True, slots=True)
class Profile:
    """Medians over the measured steps of a stage."""

    stage: StageName
    pairs_per_second: float
    tokens_per_second: float  # own tokens of both texts
    peak_gb: float
    teraflops: float
    share_of_peak: float
    hours: float  # for all steps of the stage
    times: dict[str, float]  # share of the step, by kind of work


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest rate of square products in ``dtype``, in FLOP/s: best of 5 for each of up to 3 sizes.

    A size whose product takes long is the last one: a larger one would take eight times as long, at the same rate.
    """
    peak = 0.0
    for size in (2048, 4096, 8192) if device.type == "cuda" else (1024, 2048, 4096):
        rate = product_rate(size, size, size, dtype, device)
        peak = max(peak, rate)
        if 2 * size**3 / rate > _LONG_PRODUCT:
            break
    return peak


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best of 5 rates of a product [rows, inner] @ [inner, columns], in FLOP/s."""
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype).T
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        wait_for(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best


def profile(recipe: Recipe, name: StageName, steps: int = 5, warmup: int = 2) -> Profile:
    """Run a few steps of a stage on the recipe's own data, from its base model; nothing is written.

    The steps run in a new process, whose peak memory is the stage's.

    Raises:
        InputError: if the recipe has no such stage, too few pairs, or needs more memory than there is.
    """
    settings = recipe.stage(name)
    if settings is None:
        raise InputError(f"recipe: {name} is null. Give it settings, or profile the other stage.")
    STAGES[name].check_stored(settings, recipe.model.weights)
    budget = plan_memory(recipe, STAGES[name], settings, recipe.model.name).budget
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_profile, recipe, name, settings, budget, range(warmup, warmup + steps)).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{name}: its process was killed, as the system does where memory ends. {LESS_MEMORY}"
            ) from error


def _profile(recipe: Recipe, name: StageName, settings: Schedule, budget: int, measured: range) -> Profile:
    """Run steps to the end of ``measured`` and time those in it; torch's profiler records one more."""
    prepared = prepare(recipe, recipe.model.name)
    settings = prepared.in_steps(settings, recipe.seed)
    stage = STAGES[name].build(prepared.embedder, settings, budget)
    optimizer = make_optimizer(stage.module, settings)
    backbone = prepared.embedder.backbone
    stage.module.train()
    if backbone.device.type == "cuda":
        compile_layers(backbone, prepared.embedder.dtype)
    seconds, counts, tokens, flops = [], [], [], []
    times: dict[str, float] = {}
    order = prepared.order(settings.batch_size, recipe.seed)
    for number, indices in zip(range(measured.stop + 1), order, strict=False):
        with _profiled(times, backbone.device) if number == measured.stop else nullcontext():
            started = time.perf_counter()
            pairs = prepared.tokens(indices, stage.hard_negatives)
            whole_step(stage, optimizer, number, pairs)
            seconds.append(time.perf_counter() - started)
        counts.append(len(pairs))
        tokens.append(sum(len(pair.query_text) + len(pair.document_text) for pair in pairs))
        flops.append(stage.flops(number, pairs))

    def per_second(values: Sequence[float]) -> float:
        return statistics.median(values[i] / seconds[i] for i in measured)

    rate = per_second(flops)
    return Profile(
        stage=name,
        pairs_per_second=per_second(counts),
        tokens_per_second=per_second(tokens),
        peak_gb=peak_memory(backbone.device) / 1e9,
        teraflops=rate / 1e12,
        share_of_peak=rate / matmul_peak(prepared.embedder.dtype, backbone.device),
        hours=settings.steps * statistics.median(seconds[i] for i in measured) / 3600,
        times=times,
    )


@contextmanager
def _profiled(times: dict[str, float], device: torch.device) -> Iterator[None]:
    """Fill ``times`` with each kind of work's share of the time on ``device`` in this block."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler on standard error
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=kinds) as profiler:
        yield
    sums = dict.fromkeys([*_KINDS, _OTHER], 0.0)
    for event in profiler.key_averages():
        if on_gpu and str(event.device_type) != "DeviceType.CUDA":
            continue  # an operation's time on the GPU is that of its kernels
        kind = next((kind for kind, names in _KINDS.items() if any(name in event.key for name in names)), _OTHER)
        sums[kind] += float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    total = sum(sums.values()) or 1.0
    times |= {kind: value / total for kind, value in sums.items()}


def report(measured: Profile) -> str:
    """The profile as text."""
    lines = [
        f"{measured.stage}: {measured.pairs_per_second:.2f} pairs/s, {measured.tokens_per_second:.0f} pair tokens/s, "
        f"peak memory {measured.peak_gb:.2f} GB",
        f"  {measured.teraflops:.3f} TFLOP/s, {measured.share_of_peak:.0%} of this machine's matrix-product peak; "
        f"the whole stage takes about {measured.hours:.2f} h",
    ]
    return "\n".join([*lines, *(f"  {share:5.1%}  {kind}" for kind, share in measured.times.items())])
