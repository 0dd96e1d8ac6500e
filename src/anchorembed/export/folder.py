"""The sentence-transformers folder, in the layout that servers and all versions from 5.0 read.

The folder holds the merged decoder, the baked tokenizer, last-token pooling, normalisation, both prompts and one length
limit: ``SentenceTransformer(folder)`` gives our vectors without this package. It has the module names and the pooling
keys of sentence-transformers 5, which version 6, text-embeddings-inference and vLLM read as well.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from anchorembed.export.check import Dtype, Encode, Form
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import quiet
from anchorembed.model.transformers4 import add_transformers4_settings, write_settings
from anchorembed.model.vectors import Floats, Side

_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write(embedder: Embedder, folder: Path, dtype: Dtype) -> None:
    """Write a sentence-transformers folder; the embedder's weights become ``dtype``."""
    nn.Module.to(embedder.backbone.model, getattr(torch, dtype))
    embedder.save(folder, headless=True)
    tokenizer = embedder.tokenizer
    # text-embeddings-inference takes a single number for each
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": embedder.pairs.end_id}
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    add_transformers4_settings(folder, **ids)
    _write_modules(folder, embedder.dimension, embedder.metadata.normalize)
    write_settings(
        folder / "sentence_bert_config.json",
        {"max_seq_length": embedder.metadata.lengths.document, "do_lower_case": False},
    )
    settings = {
        "__version__": {"sentence_transformers": "5.0.0"},  # of this layout; a later number makes older versions warn
        "prompts": asdict(embedder.metadata.prompts),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "model_type": "SentenceTransformer",
    }
    write_settings(folder / "config_sentence_transformers.json", settings)


def read(folder: Path) -> Encode:
    """Open a folder with sentence-transformers, on the CPU."""
    # sentence-transformers warns if the dtype is not given
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    with quiet():
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    encoders = {"query": model.encode_query, "document": model.encode_document}

    def encode(texts: list[str], side: Side) -> Floats:
        return np.asarray(encoders[side](texts, convert_to_tensor=True).float())

    return encode


def _write_modules(folder: Path, dimension: int, normalize: bool) -> None:
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(_MODULES if normalize else _MODULES[:2])
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    modes = {f"pooling_mode_{name}": name == "lasttoken" for name in _POOLINGS}
    (folder / "1_Pooling").mkdir()
    write_settings(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, "include_prompt": True} | modes
    )
    if normalize:
        (folder / "2_Normalize").mkdir()
        write_settings(folder / "2_Normalize" / "config.json", {})


FORM = Form("sentence-transformers", write, read, {"float32": 0.9999, "bfloat16": 0.99})
