"""Stage I: our step against the released way of doing it, on the same pairs.

Both tokenise, compute, clip and update within the measured step. Pair tokens are the own tokens of both texts of a
pair, without template and padding. With ``--no-checkpointing`` the released side keeps all its activations.
"""

import argparse

from common import (
    BY_TASK,
    Option,
    Side,
    StepResult,
    alternate,
    arguments,
    batches,
    facts,
    halve_until_it_fits,
    peak,
    rate,
    result,
    run,
    speedup,
    table,
)

_RELEASED, _OURS = "released", "ours"


def main() -> None:
    """Measure; a batch that the released side cannot hold in memory is halved for both sides."""
    args = arguments(
        "Stage I against the released way.",
        batch=Option(None, "pairs a step (default 32, without checkpointing 8)", int),
        by_task=BY_TASK,
        no_checkpointing=Option(False, "the released side keeps all activations"),
        tokens_per_micro_batch=Option(4096, "our token budget"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    args.batch = args.batch or (8 if args.no_checkpointing else 32)
    facts(args)
    results, did_not_fit = halve_until_it_fits(args, _RELEASED, lambda: measure(args))
    report(args, results, did_not_fit)


def measure(args: argparse.Namespace) -> dict[str, list[StepResult]]:
    """Both sides in turns."""
    chosen = batches(args, args.warmup + args.steps)
    with Side(_RELEASED, args, "released:Released", args) as released, Side(_OURS, args, "ours:stage1", args) as ours:
        return alternate([released, ours], chosen, args.warmup, args.out)


def report(args: argparse.Namespace, results: dict[str, list[StepResult]], did_not_fit: list[int]) -> None:
    """Table and result."""
    released, ours = results[_RELEASED], results[_OURS]
    faster, memory = speedup(ours, released), peak(ours) / peak(released)
    how = "without checkpointing" if args.no_checkpointing else "with checkpointing"
    table(
        f"Stage I, batch {args.batch}, texts cut at {args.cut} tokens, medians of {len(ours)} steps",
        ["", "pair tokens/s", "pairs/s", "peak memory"],
        [
            [name, f"{rate(steps):.1f}", f"{rate(steps, args.batch):.2f}", f"{peak(steps):.2f} GB"]
            for name, steps in ((f"released, {how}", released), (_OURS, ours))
        ]
        + [["ours / released", f"{faster:.2f} x", f"{faster:.2f} x", f"{memory:.2f} x"]],
    )
    result(
        benchmark="stage1",
        checkpointing=not args.no_checkpointing,
        batch=args.batch,
        did_not_fit=did_not_fit,
        cut=args.cut,
        steps=len(ours),
        released_tokens_per_second=rate(released),
        ours_tokens_per_second=rate(ours),
        speedup=faster,
        released_peak_gb=peak(released),
        ours_peak_gb=peak(ours),
        memory_ratio=memory,
    )


if __name__ == "__main__":
    run(main)
