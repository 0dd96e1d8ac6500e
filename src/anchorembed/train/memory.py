"""Refuse a stage that cannot fit into memory, with the figures and what to change; say what to lower where it ends."""

from collections.abc import Callable
from dataclasses import replace

from anchorembed.errors import InputError
from anchorembed.system.device import Weights
from anchorembed.train.memory_estimate import Shape, Use, estimate, gb

_SMALLEST = 256  # tokens below which a micro-batch is not lowered


def check_memory(stage: str, shape: Shape, use: Use, have: int, where: str, *, strict: bool) -> str:
    """Say what a stage takes, or refuse it.

    Args:
        stage: its name in the recipe.
        shape: the decoder's sizes.
        use: what the stage does with it.
        have: bytes there are; 0 where that is not known.
        where: what has them, such as ``cuda:0``.
        strict: refuse also for activations, which are estimated, not only for what is exactly known.

    Raises:
        InputError: if it cannot fit, with the figures and what makes it fit.
    """
    needs = estimate(shape, use)
    if have and needs.fixed > have:
        raise InputError(
            f"{stage}: weights {gb(needs.weights)}, gradients {gb(needs.gradients)} and moments "
            f"{gb(needs.moments)} GB are {gb(needs.fixed)} GB, and {where} has {gb(have)}. "
            f"{cure(stage, shape, use, have)}"
        )
    if strict and have and needs.total > have:
        raise InputError(
            f"{stage}: it takes about {gb(needs.total)} GB ({needs}), and {where} has {gb(have)}. "
            f"{cure(stage, shape, use, have)}"
        )
    of = f" of {where}'s {gb(have)}" if have else ""
    return f"{stage}: about {gb(needs.total)} GB{of}: {needs}"


def cure(stage: str, shape: Shape, use: Use, have: int) -> str:
    """What makes a stage fit into so many bytes, the one that costs least first; as a sentence."""

    def fits(other: Use) -> bool:
        return estimate(shape, other).total <= have

    lower = lower_budget(use, fits)
    if lower is not None:
        return _set(f"{stage}.tokens_per_micro_batch", lower, use.budget)
    if use.rank:
        stored: tuple[Weights, ...] = ("bfloat16", "nf4")
        for weights in stored[stored.index(use.weights) + 1 if use.weights in stored else 0 :]:
            changed = replace(use, weights=weights, product=2, stream=2)
            lower = use.budget if fits(changed) else lower_budget(changed, fits)
            if lower is not None:
                also = "" if lower == use.budget else f" and {stage}.tokens_per_micro_batch={lower}"
                return f"Set model.weights={weights}{also}."
    elif stage == "contrast":
        adapting = replace(use, rank=16, adapted=tuple({name for name, _, _ in shape.linear}), dropout=True)
        rest = "" if fits(adapting) else f" {cure(stage, shape, adapting, have)}"
        return f"Train adapters: leave out contrast.lora=null.{rest}"
    return "Share it out over several GPUs (recipes/accelerate has FSDP2), or start from a smaller model."


def lower_budget(use: Use, fits: Callable[[Use], bool]) -> int | None:
    """The token budget halved until the stage fits; None if that does not do."""
    budget = use.budget // 2
    while budget >= max(_SMALLEST, use.longest):
        if fits(replace(use, budget=budget)):
            return budget
        budget //= 2
    return None


def less_memory(stage: str, use: Use) -> str:
    """What to lower, and to what, where memory has ended in a step; as a sentence."""
    half = use.budget // 2
    if half >= max(_SMALLEST, use.longest):
        return _set(f"{stage}.tokens_per_micro_batch", half, use.budget)
    if use.rank and use.weights != "nf4":
        other = "bfloat16" if use.weights == "float32" else "nf4"
        return f"Set model.weights={other} (it is {use.weights}), with another output folder."
    return (
        f"Lower data.query_tokens or data.document_tokens, with another output folder: a micro-batch has "
        f"{use.tokens} tokens, the longest {'pair' if use.logits else 'text'}."
    )


def _set(key: str, value: int, before: int) -> str:
    return f"Set {key}={value} (it is {before}), which a started run may change."
