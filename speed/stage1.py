"""Stage I: our step against a step of the released research code (`released`), on the same pairs.

Both tokenise, compute, clip and update within the measured step. Pair tokens are the tokens of both texts of a pair,
without template and padding. With ``--no-checkpointing`` the released side keeps all its activations.
"""

import argparse

from common import (
    BY_TASK,
    Option,
    Side,
    StepResult,
    arguments,
    draw_batches,
    halve_until_it_fits,
    median_rate,
    median_speedup,
    peak_gb,
    print_machine,
    print_result,
    print_table,
    run_benchmark,
    run_in_turns,
)

_RELEASED, _OURS = "released", "ours"


def main() -> None:
    """Measure; a batch that the released side cannot hold in memory is halved for both sides."""
    args = arguments(
        "Stage I against the released research code.",
        batch=Option(None, "pairs a step (default 32, without checkpointing 8)", int),
        by_task=BY_TASK,
        no_checkpointing=Option(False, "the released side keeps all activations"),
        tokens_per_micro_batch=Option(4096, "our token budget"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    args.batch = args.batch or (8 if args.no_checkpointing else 32)
    print_machine(args)
    results, did_not_fit = halve_until_it_fits(args, _RELEASED, lambda: measure(args))
    report(args, results, did_not_fit)


def measure(args: argparse.Namespace) -> dict[str, list[StepResult]]:
    """Run both sides in turns."""
    batches = draw_batches(args, args.warmup + args.steps)
    with Side(_RELEASED, args, "released:Released", args) as released, Side(_OURS, args, "ours:stage1", args) as ours:
        return run_in_turns([released, ours], batches, args.warmup, args.out)


def report(args: argparse.Namespace, results: dict[str, list[StepResult]], did_not_fit: list[int]) -> None:
    """Print the table and the result."""
    released, ours = results[_RELEASED], results[_OURS]
    speedup, memory = median_speedup(ours, released), peak_gb(ours) / peak_gb(released)
    checkpointing = "without checkpointing" if args.no_checkpointing else "with checkpointing"
    print_table(
        f"Stage I, batch {args.batch}, texts cut at {args.cut} tokens, medians of {len(ours)} steps",
        ["", "pair tokens/s", "pairs/s", "peak memory"],
        [
            [name, f"{median_rate(steps):.1f}", f"{median_rate(steps, args.batch):.2f}", f"{peak_gb(steps):.2f} GB"]
            for name, steps in ((f"released, {checkpointing}", released), (_OURS, ours))
        ]
        + [["ours / released", f"{speedup:.2f} x", f"{speedup:.2f} x", f"{memory:.2f} x"]],
    )
    print_result(
        benchmark="stage1",
        checkpointing=not args.no_checkpointing,
        batch=args.batch,
        did_not_fit=did_not_fit,
        cut=args.cut,
        steps=len(ours),
        released_tokens_per_second=median_rate(released),
        ours_tokens_per_second=median_rate(ours),
        speedup=speedup,
        released_peak_gb=peak_gb(released),
        ours_peak_gb=peak_gb(ours),
        memory_ratio=memory,
    )


if __name__ == "__main__":
    run_benchmark(main)
