"""Encoding: our ``encode`` against sentence-transformers' on the exported same model, in each format it offers.

Queries and documents of all tasks in their natural mix of lengths, in consecutive chunks. Tokenising counts on every
side. Cosines are to its float32 vectors.
"""

from contextlib import ExitStack

import numpy as np
import torch
from common import (
    Option,
    Side,
    SideDied,
    StepResult,
    alternate,
    arguments,
    exported,
    facts,
    peak,
    rate,
    result,
    run,
    speedup,
    table,
    texts,
)

_FLOAT32, _BFLOAT16, _OPENVINO, _OURS = "float32", "bfloat16", "openvino", "ours"
_WARMUP = 64  # texts


def main() -> None:
    """Measure and report."""
    args = arguments(
        "Encoding against sentence-transformers.",
        cut=512,
        warmup=1,
        batch=Option(32, "texts sentence-transformers computes at once"),
        texts=Option(4000, "texts in all, in as many chunks as steps"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    facts(args)
    folder = exported(args.model)
    sample = texts(args, args.texts + args.warmup * _WARMUP)
    warming = [sample[_WARMUP * i :][:_WARMUP] for i in range(args.warmup)]
    rest, size = sample[_WARMUP * args.warmup :], args.texts // args.steps
    chunks = [rest[size * i :][:size] for i in range(args.steps)]
    missing = ""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(_FLOAT32, args, "theirs:encode", args, folder)),
            stack.enter_context(Side(_BFLOAT16, args, "theirs:encode", args, folder, torch.bfloat16)),
            stack.enter_context(Side(_OURS, args, "ours:encode", args)),
        ]
        try:
            sides.append(stack.enter_context(Side(_OPENVINO, args, "theirs:encode", args, folder, None, _OPENVINO)))
        except SideDied as died:
            missing = died.reason
            print(f"OpenVINO is left out: {missing}", flush=True)
        results = alternate(sides, [*warming, *chunks], args.warmup, args.out)
    report(results, size, args.cut, missing)


def report(results: dict[str, list[StepResult]], size: int, cut: int, missing: str) -> None:
    """Table and result."""
    ours = results[_OURS]
    likeness = {name: cosines(steps, results[_FLOAT32]) for name, steps in results.items()}
    faster = {name: speedup(ours, steps) for name, steps in results.items() if name != _OURS}
    table(
        f"Encoding {len(ours)} chunks of {size} texts cut at {cut} tokens, medians",
        ["", "texts/s", "ours is faster", "smallest cosine", "mean cosine", "peak memory"],
        [
            [
                name if name == _OURS else f"sentence-transformers {name}",
                f"{rate(steps, size):.1f}",
                f"{faster[name]:.2f} x" if name in faster else "",
                f"{likeness[name].min():.6f}",
                f"{likeness[name].mean():.6f}",
                f"{peak(steps):.2f} GB",
            ]
            for name, steps in results.items()
        ],
    )
    result(
        benchmark="encode",
        texts=len(ours) * size,
        cut=cut,
        chunks=len(ours),
        **{f"{name}_texts_per_second": rate(steps, size) for name, steps in results.items()},
        **{f"speedup_to_{name}": value for name, value in faster.items()},
        smallest_cosine=float(likeness[_OURS].min()),
        mean_cosine=float(likeness[_OURS].mean()),
        **{f"{name}_peak_gb": peak(steps) for name, steps in results.items()},
        openvino_missing=missing,
    )


def cosines(steps: list[StepResult], others: list[StepResult]) -> np.ndarray:
    """Cosine of each text's two unit vectors, [N]."""
    ours, theirs = (np.concatenate([step.extra["vectors"] for step in side]) for side in (steps, others))
    return (ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))


if __name__ == "__main__":
    run(main)
