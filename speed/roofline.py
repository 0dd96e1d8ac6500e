"""How much of the machine each of our engines reaches: model FLOPs a second over the largest matrix-product rate.

Both are measured in this run. Model FLOPs are the products with weights that the method asks for, forward and backward;
attention's own products and what is computed twice are left out. Where the step is cached, so is its second forward.
"""

import argparse
import statistics

import torch
from common import BY_TASK, Batch, Option, Side, arguments, batches, facts, result, run, table, texts

from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.embedder import Embedder
from anchorembed.train.flops import product_shapes
from anchorembed.train.profile import matmul_peak, product_rate

_ROWS = 2048  # tokens in a product of the model's own shapes


def main() -> None:
    """Measure the peak, the model's own shapes and each engine, and report."""
    args = arguments(
        "Share of the matrix-product peak.",
        by_task=BY_TASK,
        texts=Option(500, "texts encoded a step"),
        large=Option(512, "pairs in a step with cached gradients, cut at 64 tokens"),
        tokens_per_micro_batch=Option(4096, "our token budget"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    facts(args)
    device = torch.device("cpu")
    torch.set_num_threads(args.threads)
    peak = matmul_peak(torch.bfloat16, device)
    shapes = own_shapes(args, device)
    rates: dict[str, float] = {}
    for name, factory, options in (
        ("stage1", "ours:stage1", {}),
        ("stage2", "ours:stage2", {"batch": 64}),
        ("stage2_cached", "ours:stage2", {"batch": args.large, "cut": 64}),
        ("encode", "ours:encode", {}),
    ):
        rates[name] = engine(argparse.Namespace(**(vars(args) | options)), name, factory)
    again = matmul_peak(torch.bfloat16, device)
    peak = max(peak, again)
    rows = [("largest square product", peak), ("the model's own shapes", shapes), *rates.items()]
    table(
        f"Model FLOPs a second, {DEFAULT_MODEL if args.model == DEFAULT_MODEL else args.model}, bfloat16",
        ["", "TFLOP/s", "share of peak", "share of own shapes"],
        [[name, f"{rate / 1e12:.3f}", f"{rate / peak:.0%}", f"{rate / shapes:.0%}"] for name, rate in rows],
    )
    result(
        benchmark="roofline",
        peak_tflops=peak / 1e12,
        own_shapes_tflops=shapes / 1e12,
        **{f"{name}_share": rate / peak for name, rate in rates.items()},
        **{f"{name}_share_of_own_shapes": rate / shapes for name, rate in rates.items()},
    )


def own_shapes(args: argparse.Namespace, device: torch.device) -> float:
    """FLOP/s over the products of one layer's shapes, each forward, for its input and for its weight."""
    embedder = Embedder.load(args.model, device="cpu")
    flops = seconds = 0.0
    for out, into in {*product_shapes(embedder.backbone)}:
        for rows, inner, columns in ((_ROWS, into, out), (_ROWS, out, into), (out, _ROWS, into)):
            work = 2.0 * rows * inner * columns
            flops += work
            seconds += work / product_rate(rows, inner, columns, torch.bfloat16, device)
    return flops / seconds


def engine(args: argparse.Namespace, name: str, factory: str) -> float:
    """Median model FLOP/s over the measured steps."""
    count = args.warmup + args.steps
    chosen: list[Batch] = [*batches(args, count)]
    if name == "encode":
        every = texts(args, args.texts * count)
        chosen = [every[start : start + args.texts] for start in range(0, len(every), args.texts)]
    with Side(name, args, factory, args) as side:
        steps = [side.step(batch) for batch in chosen][args.warmup :]
    rate = statistics.median(step.extra["flops"] / step.seconds for step in steps)
    print(f"{name}: {rate / 1e12:.3f} TFLOP/s", flush=True)
    return rate


if __name__ == "__main__":
    run(main)
