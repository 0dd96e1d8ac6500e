"""The decoder as one graph from token ids to unit vectors, for ONNX Runtime and OpenVINO, and how they encode texts.

Axes: N texts, L tokens of the longest, H hidden size.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from anchorembed.errors import InputError, first_line
from anchorembed.export import folder as sentence_transformers
from anchorembed.export.check import Encode
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import quiet
from anchorembed.model.vectors import Floats, Side

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("token_embeddings", "sentence_embedding")
_BATCH = 4  # texts that a reloaded export encodes at once, so that some are padded


class SentenceModel(nn.Module):
    """Token ids and their mask [N, L] to states [N, L, H] and unit vectors [N, H]; positions count real tokens."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the decoder and take the state at each text's last token, on whichever side it is padded."""
        positions_NL = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states_NLH = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions_NL, use_cache=False
        ).last_hidden_state.float()
        # the tracer would make a constant of `len`
        last_N = (attention_mask * torch.arange(input_ids.shape[1])).argmax(1)
        return states_NLH, F.normalize(states_NLH[torch.arange(input_ids.shape[0]), last_N], dim=-1)


def write_settings_only(embedder: Embedder, folder: Path) -> None:
    """Write tokenizer and settings as in a sentence-transformers folder, without weights."""
    sentence_transformers.write(embedder, folder, "float32")
    for path in folder.glob("*.safetensors*"):
        path.unlink()


@torch.no_grad()
def trace(embedder: Embedder) -> tuple[torch.export.ExportedProgram, tuple[Tensor, Tensor]]:
    """The graph of an embedder, for any number and length of texts, and example inputs.

    Raises:
        InputError: if torch cannot trace the model's layers.
    """
    model: Any = embedder.backbone.model
    model.set_attn_implementation("eager")
    tokens_NL = torch.tensor([embedder.pairs.templated(["a b c"], 64)[0][-3:]] * 2)
    example = (tokens_NL, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    try:
        with silent():
            module = SentenceModel(model.base_model).eval()
            program = torch.export.export(module, example, dynamic_shapes=dict.fromkeys(INPUTS, sizes))
    except Exception as error:  # torch raises errors of many kinds
        raise InputError(
            f"torch cannot trace a {embedder.backbone.name!r} model: {first_line(error)} Use --to folder."
        ) from error
    return program, example


@contextmanager
def silent() -> Iterator[None]:
    """Silence torch's messages while it traces and converts."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def by_graph(folder: Path, run: Callable[[NDArray[np.int64], NDArray[np.int64]], Floats]) -> Encode:
    """Encode texts by ``run``, token ids and mask [N, L] to vectors [N, H], as a folder's settings say."""
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    limit = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str], side: Side) -> Floats:
        batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        vectors = []
        for batch in batches:
            encodings = tokenizer.encode_batch([prompts[side] + text for text in batch])
            ids, masks = [each.ids for each in encodings], [each.attention_mask for each in encodings]
            vectors.append(run(np.array(ids), np.array(masks)))
        return np.concatenate(vectors)

    return encode
