"""Tiny real models: 2 random layers and a committed byte-level tokenizer of 384 entries."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from anchorembed.model.backbone import Backbone
from anchorembed.model.check_packed_loss import check_reproduced, measure_scales, own_logits

DATA = Path(__file__).parents[1] / "data"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"tie_word_embeddings": True},  # its head has a bias
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "attention_multiplier": 0.3},
}
WORDS = [
    "read",
    "write",
    "open",
    "sort",
    "return",
    "delete",
    "file",
    "row",
    "table",
    "server",
    "list",
    "value",
    "folder",
    "link",
    "order",
    "line",
]


def tiny_tokenizer(
    chat_template: str | None = None, special: tuple[str, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    """Return a fresh tokenizer with extra special tokens and, if given, a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "tokenizer.json"), **(names or SPECIALS))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(name: str = "llama", vocabulary: int = 400) -> PreTrainedModel:
    """Return a random 2-layer model of an architecture in ``ARCHITECTURES``."""
    torch.manual_seed(0)
    settings = ARCHITECTURES[name]
    kind = settings.get("model_type", name)
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocabulary, **(SIZES | rest))).float()


def save_tiny(folder: Path, name: str = "llama") -> Path:
    """Write a tiny model folder."""
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """Write a tiny cross-encoder, as transformers saves one."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(**SPECIALS, pad_token="</s>")
    sizes = SIZES | {"pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model("llama", vocab_size=400, num_labels=labels, **sizes)
    AutoModelForSequenceClassification.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Write pairs whose positive repeats the query's words."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.sample(WORDS, 3)
        rows.append({"query": " ".join(words), "positive": f"{' '.join(reversed(words))} and number {number}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_values(pairs: Path, model: Path, output: Path, held_out: int = 8) -> dict[str, Any]:
    """A recipe of short texts, on the CPU in float32; its stages are the test's."""
    source = {"name": "p", "path": str(pairs)}
    return {
        "data": {"sources": [source], "query_tokens": 24, "document_tokens": 48, "held_out": held_out},
        "model": {"name": str(model), "precision": "float32", "device": "cpu"},
        "output": str(output),
    }


def reproduced(model: PreTrainedModel, name: str) -> Backbone:
    """What loading does with a model before it is trusted."""
    model.set_attn_implementation("eager")
    own_TV = own_logits(model, name)
    backbone = Backbone(model)
    backbone.input_scale, backbone.logit_scale = measure_scales(backbone, own_TV, name)
    check_reproduced(backbone, own_TV, name)
    return backbone
