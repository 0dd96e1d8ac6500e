"""Write exports of tiny models and our vectors of some texts; check_exports.py loads them with older libraries.

``python write_exports.py FOLDER``, in the environment of AnchorEmbed.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from anchorembed import Embedder, export
from anchorembed.model.load import quiet
from anchorembed.model.tokens import Lengths
from tiny import ARCHITECTURES, SIZES, tiny_tokenizer

# No query is empty: sentence-transformers 5 strips the space after the instruction.
TEXTS = ["sort", "sort the list " * 80, "文字 списки", "open a file", "sort</s> and <s>", "</s>"]
THETA = 300.0  # no version's default
PLAIN = {"rope_type": "default", "rope_theta": THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    name: {"model_type": name} | settings | {"rope_parameters": PLAIN} for name, settings in ARCHITECTURES.items()
} | {
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "phi3": {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
for kind in ("gemma3_text", "olmo3"):
    sliding = PLAIN if kind == "olmo3" else PLAIN | {"rope_theta": 30.0}
    MODELS[kind]["rope_parameters"] = {"full_attention": PLAIN, "sliding_attention": sliding}


def write(folder: Path, name: str) -> None:
    """Write a model as `Embedder.save` does, its exports, and our vectors of the texts."""
    settings = copy.deepcopy({"model_type": name} | MODELS[name])  # a Phi adds to the rotary settings that it is given
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), vocab_size=400, **(SIZES | settings))
    with quiet():
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "base")
        tiny_tokenizer(special=("<|user|>",)).save_pretrained(folder / "base")
    embedder = Embedder.load(folder / "base", precision="float32", lengths=Lengths(48, 48), instruction="find code")
    np.savez(folder / "vectors.npz", query=embedder.encode(TEXTS, side="query"), document=embedder.encode([*TEXTS, ""]))
    embedder.save(folder / "saved")
    export(folder / "saved", folder / "float32")
    export(folder / "saved", folder / "bfloat16", dtype="bfloat16")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for model in MODELS:
        write(root / model, model)
    (root / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
