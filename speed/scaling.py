"""Scaling of Stage I: time by tokens, memory by micro-batches and by vocabulary, and the cost of a long document.

Texts are random tokens, so that lengths are exact. Each measurement runs in a process of its own. Time is that of
forward and backward; the optimizer's step does not depend on tokens and is reported separately.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Option, Side, arguments, peak_gb, print_machine, print_result, print_table, run_benchmark

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.recipe_schema import Reconstruct
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import step

_LENGTHS = (24, 96)  # tokens of a query and of a document, without template
_VOCABULARIES = (49_152, 131_072, 262_144)


def main() -> None:
    """Measure and report."""
    args = arguments(
        "Scaling of Stage I.",
        batch=Option(None, "not used", int),
        steps=Option(2, "measured steps of each size", int),
        warmup=Option(1, "steps before those", int),
        most=Option(65_536, "tokens in the largest step"),
        most_words=Option(262_144, "words in the largest vocabulary"),
        long=Option(8192, "tokens of the long document"),
        tokens_per_micro_batch=Option(4096, "our token budget"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    least = max(4096, 2 * args.tokens_per_micro_batch)
    if args.most < least:
        raise InputError(f"--most: {args.most} is below {least}: 4,096 tokens, or two micro-batches. Raise it.")
    print_machine(args)
    sizes = [size for size in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536) if size <= args.most]
    times, peaks, optimizer = by_tokens(args, sizes)
    seconds_a_token = times[sizes.index(4096)] / 4096
    two_micro_batches = next(number for number, size in enumerate(sizes) if size >= 2 * args.tokens_per_micro_batch)
    ratios = [seconds / (seconds_a_token * size) for size, seconds in zip(sizes, times, strict=True)]
    off_linear = max(abs(ratio - 1) for size, ratio in zip(sizes, ratios, strict=True) if size >= 4096)
    print_table(
        f"Stage I forward and backward, {args.tokens_per_micro_batch} at once; optimizer {optimizer:.2f} s a step",
        ["tokens a step", "seconds", "of linear from 4k", "peak memory so far"],
        [
            [f"{size}", f"{seconds:.2f}", f"{ratio:.2f}", f"{gigabytes:.2f} GB"]
            for size, seconds, ratio, gigabytes in zip(sizes, times, ratios, peaks, strict=True)
        ],
    )
    vocabularies = [words for words in _VOCABULARIES if words <= max(args.most_words, _VOCABULARIES[0])]
    memory = [by_vocabulary(args, words) for words in vocabularies]
    smallest = memory[0][1]
    print_table(
        "Memory beyond weights, their bf16 copy, gradients and moments, at 8,192 tokens",
        ["words", "peak", "beyond those", "more than at 49k"],
        [
            [f"{words}", f"{total:.2f} GB", f"{beyond:.2f} GB", f"{(beyond - smallest) * 1000:.0f} MB"]
            for words, (total, beyond) in zip(vocabularies, memory, strict=True)
        ],
    )
    short, both, alone = long_document(args)
    print_table(
        f"One document of {args.long} tokens among 4,096 tokens of short pairs",
        ["", "seconds"],
        [
            ["short pairs alone", f"{short:.2f}"],
            ["the long pair alone", f"{alone:.2f}"],
            ["both in a step", f"{both:.2f}"],
        ],
    )
    print_result(
        benchmark="scaling",
        tokens=sizes,
        seconds=times,
        away_from_line=off_linear,
        peak_gb=peaks,
        memory_growth=peaks[-1] / peaks[two_micro_batches],
        optimizer_seconds=optimizer,
        vocabulary_extra_mb=[(beyond - smallest) * 1000 for _, beyond in memory],
        long_document_seconds={"short": short, "long": alone, "both": both},
    )


def by_tokens(args: argparse.Namespace, sizes: Sequence[int]) -> tuple[list[float], list[float], float]:
    """Median seconds and peak memory at each size, in one process, small to large; and the optimizer's seconds."""
    times, peaks, optimizer = [], [], 0.0
    with Side("tokens", args, stage1, args, None) as side:
        for size in sizes:
            steps = [side.step([size]) for _ in range(args.warmup + args.steps)]
            measured = steps[args.warmup :]
            times.append(statistics.median(step.extra["seconds"] for step in measured))
            peaks.append(peak_gb(measured))
            optimizer = statistics.median(step.extra["optimizer"] for step in measured)
            print(f"{size} tokens: {times[-1]:.2f} s, {peaks[-1]:.2f} GB", flush=True)
    return times, peaks, optimizer


def by_vocabulary(args: argparse.Namespace, words: int) -> tuple[float, float]:
    """Peak memory in GB, in all and beyond weights, their bf16 copy, gradients and moments."""
    with Side(f"{words} words", args, stage1, args, words) as side:
        steps = [side.step([8192]) for _ in range(2)]
    total = peak_gb(steps)
    beyond = total - steps[-1].extra["parameters"] * (4 + 2 + 4 + 8) / 1e9  # bytes of a weight in each of them
    print(f"{words} words: {total:.2f} GB, {beyond:.2f} GB beyond", flush=True)
    return total, beyond


def long_document(args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of short pairs, of both in a step, and of the long pair alone."""
    wide = argparse.Namespace(**(vars(args) | {"tokens_per_micro_batch": 2 * args.long + 256}))
    seconds = []
    with Side("long", args, stage1, wide, None) as side:
        for sizes in ([4096], [4096, -args.long], [-args.long]):
            steps = [side.step(sizes) for _ in range(args.warmup + args.steps)][args.warmup :]
            seconds.append(statistics.median(step.extra["seconds"] for step in steps))
    short, both, alone = seconds
    return short, both, alone


def stage1(args: argparse.Namespace, words: int | None) -> Callable[[Sequence[int]], dict[str, Any]]:
    """A step on pairs of random tokens: of ``size`` tokens in all, or, if negative, one document of that length."""
    embedder = Embedder.load(args.model, precision=args.precision, device="cpu", lengths=Lengths(args.long, args.long))
    if words is not None:
        embedder.backbone.model.resize_token_embeddings(words)
    stage = Reconstruction.build(embedder, Reconstruct(sink=False), args.tokens_per_micro_batch)
    module = stage.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    drawn_from = min(40_000, len(embedder.backbone.head.weight))

    def pair(lengths: tuple[int, int]) -> TokenPair:
        query, document = (torch.randint(drawn_from, (n,), generator=generator).tolist() for n in lengths)
        end = [embedder.pairs.end_id]
        return TokenPair(query + end, document + end, (), query, document, TextPair("", ""))

    def timed_step(sizes: Sequence[int]) -> dict[str, Any]:
        pairs: list[TokenPair] = []
        for size in sizes:
            pair_tokens = 2 * (sum(_LENGTHS) + 2)  # each text is encoded and written
            pairs += [pair((24, -size))] if size < 0 else [pair(_LENGTHS) for _ in range(round(size / pair_tokens))]
        started = time.perf_counter()
        step(stage, 0, pairs)
        backward_ended = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return {
            "seconds": backward_ended - started,
            "optimizer": time.perf_counter() - backward_ended,
            "parameters": parameters,
        }

    return timed_step


if __name__ == "__main__":
    run_benchmark(main)
