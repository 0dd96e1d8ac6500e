"""Share of the machine's matrix-product peak that training and encoding reach: model FLOPs a second over the peak.

Both are measured in this run. Model FLOPs are the products with weights that the method needs, forward and backward;
attention's own products and recomputation, as by cached gradients, are left out.
"""

import argparse
import statistics

import torch
from common import (
    BY_TASK,
    Batch,
    Option,
    Side,
    arguments,
    draw_batches,
    draw_texts,
    print_machine,
    print_result,
    print_table,
    run_benchmark,
)

from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.embedder import Embedder
from anchorembed.train.flops import product_shapes
from anchorembed.train.profile import matmul_peak, product_rate

_ROWS = 2048  # tokens in a product of the model's shapes


def main() -> None:
    """Measure the peak, products of the model's shapes, and each workload, and report."""
    args = arguments(
        "Share of the matrix-product peak.",
        by_task=BY_TASK,
        texts=Option(500, "texts encoded a step"),
        large=Option(512, "pairs a step with cached gradients, cut at 64 tokens"),
        tokens_per_micro_batch=Option(4096, "our token budget"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    print_machine(args)
    device = torch.device("cpu")
    torch.set_num_threads(args.threads)
    peak = matmul_peak(torch.bfloat16, device)
    shapes_rate = model_shapes_rate(args, device)
    rates: dict[str, float] = {}
    for name, factory, options in (
        ("stage1", "ours:stage1", {}),
        ("stage2", "ours:stage2", {"batch": 64}),
        ("stage2_cached", "ours:stage2", {"batch": args.large, "cut": 64}),
        ("encode", "ours:encode", {}),
    ):
        rates[name] = workload_rate(argparse.Namespace(**(vars(args) | options)), name, factory)
    peak = max(peak, matmul_peak(torch.bfloat16, device))  # measured before and after, as other load varies
    rows = [("largest square product", peak), ("the model's own shapes", shapes_rate), *rates.items()]
    print_table(
        f"Model FLOPs a second, {DEFAULT_MODEL if args.model == DEFAULT_MODEL else args.model}, bfloat16",
        ["", "TFLOP/s", "share of peak", "share of own shapes"],
        [[name, f"{rate / 1e12:.3f}", f"{rate / peak:.0%}", f"{rate / shapes_rate:.0%}"] for name, rate in rows],
    )
    print_result(
        benchmark="roofline",
        peak_tflops=peak / 1e12,
        own_shapes_tflops=shapes_rate / 1e12,
        **{f"{name}_share": rate / peak for name, rate in rates.items()},
        **{f"{name}_share_of_own_shapes": rate / shapes_rate for name, rate in rates.items()},
    )


def model_shapes_rate(args: argparse.Namespace, device: torch.device) -> float:
    """FLOP/s of the products of a layer: each weight's forward product, and those of both its gradients."""
    embedder = Embedder.load(args.model, device="cpu")
    flops = seconds = 0.0
    for out, into in {*product_shapes(embedder.backbone)}:
        for rows, inner, columns in ((_ROWS, into, out), (_ROWS, out, into), (out, _ROWS, into)):
            work = 2.0 * rows * inner * columns
            flops += work
            seconds += work / product_rate(rows, inner, columns, torch.bfloat16, device)
    return flops / seconds


def workload_rate(args: argparse.Namespace, name: str, factory: str) -> float:
    """Median model FLOP/s over the measured steps."""
    count = args.warmup + args.steps
    drawn: list[Batch] = [*draw_batches(args, count)]
    if name == "encode":
        sample = draw_texts(args, args.texts * count)
        drawn = [sample[start : start + args.texts] for start in range(0, len(sample), args.texts)]
    with Side(name, args, factory, args) as side:
        steps = [side.step(batch) for batch in drawn][args.warmup :]
    rate: float = statistics.median(step.extra["flops"] / step.seconds for step in steps)
    print(f"{name}: {rate / 1e12:.3f} TFLOP/s", flush=True)
    return rate


if __name__ == "__main__":
    run_benchmark(main)
