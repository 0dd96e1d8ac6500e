"""Stage II: our step against sentence-transformers' own trainer, same model, same LoRA, same pairs in the same order.

Queries and positives only. Both sides tokenise within the measured step. From 512 pairs on, or with ``--cached``, both
cache gradients: CachedMultipleNegativesRankingLoss in mini-batches of texts, we under a budget of as many tokens as
such a mini-batch has on average. There the steps that warm up are of 64 pairs: the same mini-batches, and a memory peak
to compare the large batch's with.
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
    alternate,
    arguments,
    batches,
    exported,
    facts,
    halve_until_it_fits,
    pair_tokenizer,
    peak,
    rate,
    result,
    run,
    speedup,
    table,
)

from anchorembed.data.pairs import TextPair

_THEIRS, _OURS = "sentence-transformers", "ours"
_LARGE = 512
_SMALL = 64  # pairs of a step that warms up for cached ones


def main() -> None:
    """Measure and report."""
    args = settle(
        arguments(
            "Stage II against sentence-transformers' trainer.",
            batch=64,
            by_task=BY_TASK,
            cut=Option(None, "longest text in tokens, template included (default 256, cached 64)", int),
            steps=Option(None, "measured steps (default 5, cached 3)", int),
            warmup=Option(None, "steps before those (default 2, cached 1)", int),
            cached=Option(False, f"cache gradients; implied from a batch of {_LARGE} on"),
            mini_batch=Option(64, "texts in a mini-batch when gradients are cached"),
            tokens_per_micro_batch=Option(
                None, "our token budget (default: a mini-batch's mean, or the whole batch's)", int
            ),
            precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
        )
    )
    facts(args)
    folder = exported(args.model)
    (results, small_peak), did_not_fit = halve_until_it_fits(args, _THEIRS, lambda: measure(args, folder))
    theirs, ours = results[_THEIRS], results[_OURS]
    faster, memory = speedup(ours, theirs), peak(ours) / peak(theirs)
    loss = f"cached, mini-batches of {args.mini_batch}" if args.cached else "not cached"
    table(
        f"Stage II, batch {args.batch}, {loss}, texts cut at {args.cut} tokens, medians of {len(ours)} steps",
        ["", "pairs/s", "pair tokens/s", "peak memory"],
        [
            [name, f"{rate(steps, args.batch):.2f}", f"{rate(steps):.1f}", f"{peak(steps):.2f} GB"]
            for name, steps in results.items()
        ]
        + [["ours / theirs", f"{faster:.2f} x", f"{faster:.2f} x", f"{memory:.2f} x"]],
    )
    growth = peak(ours) / small_peak if small_peak else None
    if growth:
        print(f"our peak memory over that at {_SMALL} pairs: {growth:.2f} x")
    result(
        benchmark="stage2",
        did_not_fit=did_not_fit,
        cached=args.cached,
        batch=args.batch,
        cut=args.cut,
        steps=len(ours),
        theirs_pairs_per_second=rate(theirs, args.batch),
        ours_pairs_per_second=rate(ours, args.batch),
        speedup=faster,
        theirs_peak_gb=peak(theirs),
        ours_peak_gb=peak(ours),
        memory_ratio=memory,
        growth_from_small=growth,
    )


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[StepResult]], float | None]:
    """Run both sides in turns; returns the measured steps, and our peak in GB after small warm-up steps, if any."""
    chosen = batches(args, args.warmup + args.steps)
    if args.tokens_per_micro_batch is None:
        args.tokens_per_micro_batch = budget(args, chosen)
    with Side(_THEIRS, args, "theirs:Training", args, folder) as side, Side(_OURS, args, "ours:stage2", args) as our:
        if not args.cached or not args.warmup:
            return alternate([side, our], chosen, args.warmup, args.out), None
        alternate([side, our], [batch[:_SMALL] for batch in chosen[: args.warmup]], args.warmup, args.out)
        small_peak = our.peak_bytes / GIGABYTE
        return alternate([side, our], chosen[args.warmup :], 0, args.out), small_peak


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on whether gradients are cached."""
    args.cached = args.cached or args.batch >= _LARGE
    cut, steps, warmup = (64, 3, 1) if args.cached else (256, 5, 2)
    args.cut = cut if args.cut is None else args.cut
    args.steps = steps if args.steps is None else args.steps
    args.warmup = warmup if args.warmup is None else args.warmup
    return args


def budget(args: argparse.Namespace, chosen: Sequence[Sequence[TextPair]]) -> int:
    """Tokens that a whole batch has at most, or a mini-batch on average, template included."""
    if not args.cached:
        return 2 * args.batch * args.cut
    texts = [text for batch in chosen for pair in batch for text in (pair.query, pair.positive)]
    lengths = [len(ids) for ids in pair_tokenizer(args.model, args.cut).templated(texts, args.cut)]
    return round(args.mini_batch * sum(lengths) / len(lengths))


if __name__ == "__main__":
    run(main)
