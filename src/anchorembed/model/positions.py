"""The longest text of a model: within its positions, and within the context for which its rotary frequencies are fixed.

Dynamic NTK and LongRoPE take other frequencies for a whole batch once its longest text is longer than the original
context. Up to that length no text's vector depends on the other texts of its batch.
"""

from typing import Any

from transformers import PretrainedConfig

from anchorembed.errors import InputError
from anchorembed.model.tokens import Lengths

_DEFAULT_LENGTH = 512
_FOLLOW_THE_LONGEST = ("dynamic", "longrope", "su")  # types of rotary positions; "su" is LongRoPE's older name
_NO_LIMIT = 2**31


def default_lengths(config: PretrainedConfig) -> Lengths:
    """512 tokens a side, or as many as the model takes."""
    most, _ = most_positions(config)
    length = min(_DEFAULT_LENGTH, most)
    return Lengths(length, length)


def check_lengths(name: str, config: PretrainedConfig, lengths: Lengths) -> None:
    """Refuse limits beyond a model's positions, or where its rotary frequencies would follow the longest text.

    Raises:
        InputError: with both numbers.
    """
    most, reason = most_positions(config)
    for side, length in (("query", lengths.query), ("document", lengths.document)):
        if length > most:
            raise InputError(
                f"data.{side}_tokens: {length} is above {most}, {reason} of {name!r}. Set it to {most} or less."
            )


def most_positions(config: PretrainedConfig) -> tuple[int, str]:
    """The most tokens of a text, and the name of that limit."""
    text_config = config.get_text_config()
    most = getattr(text_config, "max_position_embeddings", None) or _NO_LIMIT
    limits = [(int(most), "the max_position_embeddings")]
    for rope in rotary_settings(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in _FOLLOW_THE_LONGEST:
            original: Any = rope.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", most
            )
            limits.append((int(original), f"the original context, beyond which {kind} positions follow the batch,"))
    return min(limits)


def rotary_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The settings of rotary positions: those of the model, then those of each kind of layer."""
    text_config = config.get_text_config()
    ropes = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return [ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))]
