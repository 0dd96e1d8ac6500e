"""Scores of query-text pairs by a cross-encoder, which reads both texts at once, loaded by sentence-transformers.

Weights are read as safetensors only, and no code that comes with a model is run.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from anchorembed.errors import InputError, first_line
from anchorembed.model.intact import check_complete
from anchorembed.model.load import file_beside, quiet

_PROBE = [("a query", "a text"), ("a query", "a longer text " * 8)]
_ROUNDING = 0.05  # largest difference by bfloat16
_CHARACTERS_A_TOKEN = 64  # characters kept for each token of the model's limit; the rest is not tokenised

Logits = NDArray[np.float64]
Reranker = Callable[[list[tuple[str, str]]], Logits]  # query-text pairs [N] -> logits [N], higher is more relevant


def by_cross_encoder(name: str | Path) -> Reranker:
    """Score by the logits, before any activation, of a cross-encoder: a local folder or hub id.

    Raises:
        InputError: if the model is incomplete, is not a cross-encoder with one score, or gives a score that is not
            finite.
    """
    name = str(name)
    with quiet():
        try:
            model = _load(name)
            alone, padded = (_predicted(model, pairs)[0] for pairs in (_PROBE[:1], _PROBE))
        except InputError:
            raise
        except Exception as error:  # of sentence-transformers and transformers, of many kinds
            raise InputError(
                f"--rerank: {name!r} cannot be loaded ({first_line(error)}). Give a cross-encoder's folder or hub id, "
                "with safetensors weights."
            ) from error
    if model.num_labels != 1:
        raise InputError(
            f"--rerank: {name!r} gives {model.num_labels} scores a pair, not 1. Give a cross-encoder for reranking."
        )
    if abs(alone - padded) > _ROUNDING * (1 + abs(alone)):
        raise InputError(
            f"--rerank: {name!r} scores a pair {alone:.3g} alone and {padded:.3g} beside a longer one. The "
            "padding token of its tokenizer is not pad_token_id of its config.json: set that to the tokenizer's."
        )

    def score(pairs: list[tuple[str, str]]) -> Logits:
        logits = _predicted(model, pairs)
        if not np.isfinite(logits).all():
            query, text = pairs[int(np.flatnonzero(~np.isfinite(logits))[0])]
            raise InputError(
                f"--rerank: {name!r} gives no finite score for {query[:40]!r} and {text[:40]!r}. Its weights are "
                "damaged, or too large for their number format: give another model."
            )
        return logits

    return score


def _predicted(model: Any, pairs: list[tuple[str, str]]) -> Logits:  # noqa: ANN401 - as `_load` returns it
    most = _CHARACTERS_A_TOKEN * (model.max_seq_length or sys.maxsize)
    cut = [(query[:most], text[:most]) for query, text in pairs]
    logits: Logits = np.asarray(model.predict(cut, activation_fn=nn.Identity(), show_progress_bar=False), np.float64)
    return logits


def _load(name: str) -> Any:  # noqa: ANN401 - sentence-transformers has no types here
    from sentence_transformers import CrossEncoder  # noqa: PLC0415 - takes a second, and only reranking needs it

    architectures = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or ["none"]
    settings = file_beside(name, "config_sentence_transformers.json")
    saved_as = json.loads(settings.read_bytes()).get("model_type") if settings else None
    if architectures[0].endswith("ForSequenceClassification"):
        # CrossEncoder would draw missing weights at random; on the meta device they are listed and nothing is read
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "device_map": "meta"}
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
        check_complete(name, {"missing_keys": loaded[1]["missing_keys"]})
    elif saved_as != "CrossEncoder":
        raise InputError(
            f"--rerank: {name!r} is no cross-encoder: its architecture is {architectures[0]}, which has no score of a "
            "pair. Give one that ends in ForSequenceClassification, or that sentence-transformers saved."
        )
    model = CrossEncoder(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    if not model.tokenizer.chat_template:  # a chat template puts special tokens into the text
        model.tokenizer.split_special_tokens = True  # a special token's name in a text is text
    return model
