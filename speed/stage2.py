"""Stage II: our step against sentence-transformers' trainer, with the same model, LoRA, and pairs in the same order.

Pairs have no hard negatives. Both sides tokenise within the measured step. From 512 pairs on, or with ``--cached``,
both cache gradients: CachedMultipleNegativesRankingLoss in mini-batches of texts, ours under a token budget, by default
the mean tokens of such a mini-batch. Warm-up steps then have 64 pairs; their memory peak is compared with that of the
large batch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import (
    BY_TASK,
    GIGABYTE,
    Option,
    Side,
    StepResult,
    arguments,
    draw_batches,
    exported_folder,
    halve_until_it_fits,
    median_rate,
    median_speedup,
    pair_tokenizer,
    peak_gb,
    print_machine,
    print_result,
    print_table,
    run_benchmark,
    run_in_turns,
)

from anchorembed.data.pairs import TextPair

_THEIRS, _OURS = "sentence-transformers", "ours"
_LARGE = 512
_SMALL = 64  # pairs of a warm-up step when gradients are cached


def main() -> None:
    """Measure and report."""
    args = fill_defaults(
        arguments(
            "Stage II against sentence-transformers' trainer.",
            batch=64,
            by_task=BY_TASK,
            cut=Option(None, "longest text in tokens, template included (default 256, cached 64)", int),
            steps=Option(None, "measured steps (default 5, cached 3)", int),
            warmup=Option(None, "steps before the measured ones (default 2, cached 1)", int),
            cached=Option(False, f"cache gradients, as is always done from a batch of {_LARGE} on"),
            mini_batch=Option(64, "texts in a mini-batch when gradients are cached"),
            tokens_per_micro_batch=Option(
                None, "our token budget (default: a mini-batch's mean, or the whole batch's)", int
            ),
            precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
        )
    )
    print_machine(args)
    folder = exported_folder(args.model)
    (results, small_peak), did_not_fit = halve_until_it_fits(args, _THEIRS, lambda: measure(args, folder))
    theirs, ours = results[_THEIRS], results[_OURS]
    speedup, memory = median_speedup(ours, theirs), peak_gb(ours) / peak_gb(theirs)
    loss = f"cached, mini-batches of {args.mini_batch}" if args.cached else "not cached"
    print_table(
        f"Stage II, batch {args.batch}, {loss}, texts cut at {args.cut} tokens, medians of {len(ours)} steps",
        ["", "pairs/s", "pair tokens/s", "peak memory"],
        [
            [name, f"{median_rate(steps, args.batch):.2f}", f"{median_rate(steps):.1f}", f"{peak_gb(steps):.2f} GB"]
            for name, steps in results.items()
        ]
        + [["ours / theirs", f"{speedup:.2f} x", f"{speedup:.2f} x", f"{memory:.2f} x"]],
    )
    growth = peak_gb(ours) / small_peak if small_peak else None
    if growth:
        print(f"our peak memory over that at {_SMALL} pairs: {growth:.2f} x")
    print_result(
        benchmark="stage2",
        did_not_fit=did_not_fit,
        cached=args.cached,
        batch=args.batch,
        cut=args.cut,
        steps=len(ours),
        theirs_pairs_per_second=median_rate(theirs, args.batch),
        ours_pairs_per_second=median_rate(ours, args.batch),
        speedup=speedup,
        theirs_peak_gb=peak_gb(theirs),
        ours_peak_gb=peak_gb(ours),
        memory_ratio=memory,
        growth_from_small=growth,
    )


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[StepResult]], float | None]:
    """Run both sides in turns; returns the measured steps, and our peak in GB after small warm-up steps, if any."""
    batches = draw_batches(args, args.warmup + args.steps)
    if args.tokens_per_micro_batch is None:
        args.tokens_per_micro_batch = token_budget(args, batches)
    with Side(_THEIRS, args, "theirs:Training", args, folder) as theirs, Side(_OURS, args, "ours:stage2", args) as ours:
        if not args.cached or not args.warmup:
            return run_in_turns([theirs, ours], batches, args.warmup, args.out), None
        small_batches = [batch[:_SMALL] for batch in batches[: args.warmup]]
        run_in_turns([theirs, ours], small_batches, args.warmup, args.out)
        small_peak = ours.peak_bytes / GIGABYTE
        return run_in_turns([theirs, ours], batches[args.warmup :], 0, args.out), small_peak


def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on whether gradients are cached."""
    args.cached = args.cached or args.batch >= _LARGE
    cut, steps, warmup = (64, 3, 1) if args.cached else (256, 5, 2)
    args.cut = cut if args.cut is None else args.cut
    args.steps = steps if args.steps is None else args.steps
    args.warmup = warmup if args.warmup is None else args.warmup
    return args


def token_budget(args: argparse.Namespace, batches: Sequence[Sequence[TextPair]]) -> int:
    """Tokens that a batch has at most, or with cached gradients those of a mini-batch on average, with template."""
    if not args.cached:
        return 2 * args.batch * args.cut
    texts = [text for batch in batches for pair in batch for text in (pair.query, pair.positive)]
    lengths = [len(ids) for ids in pair_tokenizer(args.model, args.cut).templated(texts, args.cut)]
    return round(args.mini_batch * sum(lengths) / len(lengths))


if __name__ == "__main__":
    run_benchmark(main)
