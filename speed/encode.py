"""Encoding: our ``encode`` against sentence-transformers' on our export of the same model, in several formats.

Texts are queries and documents of all tasks in their natural mix of lengths, in consecutive chunks. Tokenising is
measured on every side. Cosines are to sentence-transformers' float32 vectors.
"""

from contextlib import ExitStack

import numpy as np
import torch
from common import (
    Option,
    Side,
    SideDied,
    StepResult,
    arguments,
    draw_texts,
    exported_folder,
    median_rate,
    median_speedup,
    peak_gb,
    print_machine,
    print_result,
    print_table,
    run_benchmark,
    run_in_turns,
)

_FLOAT32, _BFLOAT16, _OPENVINO, _OURS = "float32", "bfloat16", "openvino", "ours"
_WARMUP = 64  # texts in a warm-up step


def main() -> None:
    """Measure and report."""
    args = arguments(
        "Encoding against sentence-transformers.",
        cut=512,
        warmup=1,
        batch=Option(32, "texts that sentence-transformers computes at once"),
        texts=Option(4000, "texts in all, in one chunk a measured step"),
        precision=Option("auto", "of our matrix products: auto, bfloat16 or float32"),
    )
    print_machine(args)
    folder = exported_folder(args.model)
    sample = draw_texts(args, args.texts + args.warmup * _WARMUP)
    measured, size = sample[_WARMUP * args.warmup :], args.texts // args.steps
    batches = [sample[_WARMUP * i :][:_WARMUP] for i in range(args.warmup)]
    batches += [measured[size * i :][:size] for i in range(args.steps)]
    openvino_fault = ""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(_FLOAT32, args, "theirs:encode", args, folder)),
            stack.enter_context(Side(_BFLOAT16, args, "theirs:encode", args, folder, torch.bfloat16)),
            stack.enter_context(Side(_OURS, args, "ours:encode", args)),
        ]
        try:
            sides.append(stack.enter_context(Side(_OPENVINO, args, "theirs:encode", args, folder, None, _OPENVINO)))
        except SideDied as error:
            openvino_fault = error.reason
            print(f"OpenVINO is left out: {openvino_fault}", flush=True)
        results = run_in_turns(sides, batches, args.warmup, args.out)
    report(results, size, args.cut, openvino_fault)


def report(results: dict[str, list[StepResult]], size: int, cut: int, openvino_fault: str) -> None:
    """Print the table and the result."""
    ours = results[_OURS]
    cosines_of = {name: cosines(steps, results[_FLOAT32]) for name, steps in results.items()}
    speedups = {name: median_speedup(ours, steps) for name, steps in results.items() if name != _OURS}
    print_table(
        f"Encoding {len(ours)} chunks of {size} texts cut at {cut} tokens, medians",
        ["", "texts/s", "ours is faster", "smallest cosine", "mean cosine", "peak memory"],
        [
            [
                name if name == _OURS else f"sentence-transformers {name}",
                f"{median_rate(steps, size):.1f}",
                f"{speedups[name]:.2f} x" if name in speedups else "",
                f"{cosines_of[name].min():.6f}",
                f"{cosines_of[name].mean():.6f}",
                f"{peak_gb(steps):.2f} GB",
            ]
            for name, steps in results.items()
        ],
    )
    print_result(
        benchmark="encode",
        texts=len(ours) * size,
        cut=cut,
        chunks=len(ours),
        **{f"{name}_texts_per_second": median_rate(steps, size) for name, steps in results.items()},
        **{f"speedup_to_{name}": value for name, value in speedups.items()},
        smallest_cosine=float(cosines_of[_OURS].min()),
        mean_cosine=float(cosines_of[_OURS].mean()),
        **{f"{name}_peak_gb": peak_gb(steps) for name, steps in results.items()},
        openvino_missing=openvino_fault,
    )


def cosines(steps: list[StepResult], others: list[StepResult]) -> np.ndarray:
    """Cosine of each text's two unit vectors, [N]."""
    ours, theirs = (np.concatenate([step.extra["vectors"] for step in side]) for side in (steps, others))
    return (ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))


if __name__ == "__main__":
    run_benchmark(main)
