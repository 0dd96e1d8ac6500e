"""Refuse a model with missing, unknown, misshapen or damaged weights, by their names, before it is used.

transformers fills weights that are missing or misshapen with random numbers, and loads weights that are NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anchorembed.errors import InputError

_NAMED = 3  # names in a message; the rest are counted


def check_complete(name: str, loading_info: Mapping[str, Iterable[object]]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has weights that the model lacks or has of other shapes.

    ``loading_info`` is transformers' ``output_loading_info``; a tied output head is not missing there.

    Raises:
        InputError: with the weights' names.
    """
    faults = (
        ("missing_keys", "its files lack", "They would be random numbers. Download or export the model again, whole."),
        ("unexpected_keys", "its architecture has no", "Name a causal language model's own folder, as it was saved."),
        ("mismatched_keys", "its configuration gives another shape to", "Use the one saved with these weights."),
    )
    for key, fault, cure in faults:
        if weights := sorted(map(_with_shapes, loading_info.get(key, ()))):
            raise InputError(f"model {name!r}: {fault} {_listed(weights)}. {cure}")


@torch.no_grad()
def check_weights_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that are not finite numbers; of 4-bit weights, the scales are checked.

    Raises:
        InputError: with the weights' names.
    """
    weights = {key: weight for key, weight in model.state_dict().items() if weight.is_floating_point()}
    if broken := [key for key, weight in weights.items() if not weight.isfinite().all()]:
        raise InputError(
            f"model {name!r}: {_listed(broken)} holds NaN or infinite numbers. "
            "Its training diverged, or the file is damaged: use an earlier checkpoint, or download it again."
        )


def check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a baked tokenizer whose texts, template or padding have token ids without an input vector in the model.

    Other special tokens, such as Gemma 3's for images, need none: no text contains them.

    Raises:
        InputError: with both numbers.
    """
    weight: Any = model.get_input_embeddings().weight
    rows = len(weight)
    specials = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    of_texts = set(tokenizer.get_vocab().values()) - specials
    tokens = max({*of_texts, *tokenizer("")["input_ids"], tokenizer.pad_token_id}) + 1
    if tokens > rows:
        raise InputError(
            f"model {name!r}: its tokenizer has {tokens} tokens, its weights {rows}. Use the tokenizer that was "
            f"saved with these weights, or add rows and train them: model.resize_token_embeddings({tokens})."
        )


def _with_shapes(weight: object) -> str:
    """A weight's name; of one with two shapes, the shapes of its file and of its configuration as well."""
    if not isinstance(weight, tuple):
        return str(weight)
    name, stored, configured = weight
    return f"{name} ({list(configured)} instead of {list(stored)})"


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
