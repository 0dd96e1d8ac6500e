"""Refuse a stage that cannot fit into memory, and name the settings to change; also after memory ended in a step."""

from collections.abc import Callable
from dataclasses import replace

from anchorembed.errors import InputError
from anchorembed.recipe_schema import Lora
from anchorembed.system.device import Weights
from anchorembed.train.memory_estimate import Shape, Use, estimate, gb

_SMALLEST = 256  # tokens of a micro-batch


def check_memory(stage: str, shape: Shape, use: Use, available: int, device: str, *, strict: bool) -> str:
    """Return a sentence on the memory that a stage takes of the ``available`` bytes of ``device``, or refuse it.

    ``available`` is 0 if it is unknown. If ``strict``, a stage is refused also for activations, which are estimated;
    otherwise only for weights, gradients and moments.

    Raises:
        InputError: if the stage cannot fit, with the figures and the settings that make it fit.
    """
    needs = estimate(shape, use)
    if not available or (needs.total if strict else needs.fixed) <= available:
        share = f" of {device}'s {gb(available)}" if available else ""
        return f"{stage}: about {gb(needs.total)} GB{share}: {needs}"
    figures = f"it takes about {gb(needs.total)} GB ({needs})"
    if needs.fixed > available:
        guide = f"the guide {gb(needs.guide)}, " if needs.guide else ""
        figures = (
            f"{guide}weights {gb(needs.weights)}, gradients {gb(needs.gradients)} and moments {gb(needs.moments)} GB "
            f"are {gb(needs.fixed)} GB"
        )
    raise InputError(f"{stage}: {figures}, and {device} has {gb(available)}. {cure(stage, shape, use, available)}")


def cure(stage: str, shape: Shape, use: Use, available: int) -> str:
    """A sentence with the settings that make a stage fit into ``available`` bytes at the least cost."""

    def fits(other: Use) -> bool:
        return estimate(shape, other).total <= available

    lower = lower_budget(use, fits)
    if lower is not None:
        return _set(f"{stage}.tokens_per_micro_batch", lower, use.budget)
    if use.size.lora:
        smaller: tuple[Weights, ...] = ("bfloat16", "nf4") if use.shards == 1 else ()  # only float32 is sharded
        for weights in smaller[smaller.index(use.weights) + 1 if use.weights in smaller else 0 :]:
            changed = replace(use, weights=weights, product=2, stream=2)
            lower = use.budget if fits(changed) else lower_budget(changed, fits)
            if lower is not None:
                also = "" if lower == use.budget else f" and {stage}.tokens_per_micro_batch={lower}"
                return f"Set model.weights={weights}{also}."
    else:
        adapting = replace(use, size=replace(use.size, lora=Lora(targets=[*{name for name, _, _ in shape.linear}])))
        rest = "" if fits(adapting) else f" {cure(stage, shape, adapting, available)}"
        how = "leave out contrast.lora=null" if stage == "contrast" else "set reconstruct.lora={}"
        return f"Train adapters: {how}.{rest}"
    return "Share it out over several GPUs (recipes/accelerate has FSDP2), or start from a smaller model."


def lower_budget(use: Use, fits: Callable[[Use], bool]) -> int | None:
    """The token budget, halved until the stage fits; None if it does not fit even then."""
    budget = use.budget // 2
    while budget >= max(_SMALLEST, use.size.longest):
        if fits(replace(use, budget=budget)):
            return budget
        budget //= 2
    return None


def less_memory(stage: str, use: Use) -> str:
    """A sentence with the setting to lower after memory has ended in a step."""
    half = use.tokens // 2
    if half >= max(_SMALLEST, use.size.longest):
        return _set(f"{stage}.tokens_per_micro_batch", half, use.budget)
    if use.size.lora and use.weights != "nf4":
        other = "bfloat16" if use.weights == "float32" else "nf4"
        return f"Set model.weights={other} (it is {use.weights}), with another output folder."
    return (
        f"Lower data.query_tokens or data.document_tokens, with another output folder: a micro-batch has "
        f"{use.tokens} tokens, the longest {'pair' if use.logits else 'text'}."
    )


def _set(key: str, value: int, before: int) -> str:
    return f"Set {key}={value} (it is {before}), which a started run may change."
