"""How Stage I grows: time with tokens, memory with micro-batches and with the vocabulary, and one long document.

Made texts of random words, so that lengths are exact. Each measurement runs in a process of its own. Time is that of
forward and backward; the optimizer's step does not depend on tokens and is shown apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Option, Side, arguments, facts, peak, result, run, table

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.recipe_schema import Reconstruct
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import step

_LENGTHS = (24, 96)  # own tokens of a query and of a document
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
    facts(args)
    sizes = [size for size in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536) if size <= args.most]
    times, peaks, optimizer = tokens(args, sizes)
    line = times[sizes.index(4096)] / 4096
    several = next(number for number, size in enumerate(sizes) if size >= 2 * args.tokens_per_micro_batch)
    away = max((abs(seconds / (line * size) - 1) for size, seconds in zip(sizes, times, strict=True) if size >= 4096))
    table(
        f"Stage I forward and backward, {args.tokens_per_micro_batch} at once; optimizer {optimizer:.2f} s a step",
        ["tokens a step", "seconds", "of the line through 4k", "peak memory so far"],
        [
            [f"{size}", f"{seconds:.2f}", f"{seconds / (line * size):.2f}", f"{gigabytes:.2f} GB"]
            for size, seconds, gigabytes in zip(sizes, times, peaks, strict=True)
        ],
    )
    vocabularies = [words for words in _VOCABULARIES if words <= max(args.most_words, _VOCABULARIES[0])]
    extra = [vocabulary(args, words) for words in vocabularies]
    table(
        "Memory beyond weights, their bf16 copy, gradients and moments, at 8,192 tokens",
        ["words", "peak", "beyond those", "more than at 49k"],
        [
            [f"{words}", f"{whole:.2f} GB", f"{beyond:.2f} GB", f"{(beyond - extra[0][1]) * 1000:.0f} MB"]
            for words, (whole, beyond) in zip(vocabularies, extra, strict=True)
        ],
    )
    short, both, alone = long_document(args)
    table(
        f"One document of {args.long} tokens among 4,096 tokens of short pairs",
        ["", "seconds"],
        [
            ["short pairs alone", f"{short:.2f}"],
            ["the long pair alone", f"{alone:.2f}"],
            ["both in a step", f"{both:.2f}"],
        ],
    )
    result(
        benchmark="scaling",
        tokens=sizes,
        seconds=times,
        away_from_line=away,
        peak_gb=peaks,
        memory_growth=peaks[-1] / peaks[several],
        optimizer_seconds=optimizer,
        vocabulary_extra_mb=[(beyond - extra[0][1]) * 1000 for _, beyond in extra],
        long_document_seconds={"short": short, "long": alone, "both": both},
    )


def tokens(args: argparse.Namespace, sizes: Sequence[int]) -> tuple[list[float], list[float], float]:
    """Median seconds and peak memory at each size, in one process, small to large; and the optimizer's seconds."""
    times, peaks, optimizer = [], [], 0.0
    with Side("tokens", args, stage1, args, None) as side:
        for size in sizes:
            steps = [side.step([size]) for _ in range(args.warmup + args.steps)]
            measured = steps[args.warmup :]
            times.append(statistics.median(step.extra["seconds"] for step in measured))
            peaks.append(peak(measured))
            optimizer = statistics.median(step.extra["optimizer"] for step in measured)
            print(f"{size} tokens: {times[-1]:.2f} s, {peaks[-1]:.2f} GB", flush=True)
    return times, peaks, optimizer


def vocabulary(args: argparse.Namespace, words: int) -> tuple[float, float]:
    """Peak memory in GB, and what of it is not weights, copy, gradients and moments."""
    with Side(f"{words} words", args, stage1, args, words) as side:
        steps = [side.step([8192]) for _ in range(2)]
    whole = peak(steps)
    beyond = whole - steps[-1].extra["parameters"] * (4 + 2 + 4 + 8) / 1e9
    print(f"{words} words: {whole:.2f} GB, {beyond:.2f} GB beyond", flush=True)
    return whole, beyond


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
    """A step on made pairs: a size is that many computed tokens, a negative one a single document of that length."""
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
        return TokenPair(query + end, document + end, (), query, document, TextPair("made", "made"))

    def timed_step(sizes: Sequence[int]) -> dict[str, Any]:
        pairs: list[TokenPair] = []
        for size in sizes:
            a_pair = 2 * (sum(_LENGTHS) + 2)
            pairs += [pair((24, -size))] if size < 0 else [pair(_LENGTHS) for _ in range(round(size / a_pair))]
        started = time.perf_counter()
        step(stage, 0, pairs)
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return {
            "seconds": middle - started,
            "optimizer": time.perf_counter() - middle,
            "parameters": parameters,
        }

    return timed_step


if __name__ == "__main__":
    run(main)
