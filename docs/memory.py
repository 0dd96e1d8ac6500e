"""Print the table of docs/models.md: python docs/memory.py; of other models: python docs/memory.py MODEL ...

MODEL is a folder, a hub id or a .gguf file; its configuration is read, not its weights. Figures are the estimates that
training makes before it starts, in GB, with the paper's batch and lengths, on a GPU with bfloat16 products.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from anchorembed.model.load import load_config
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Contrast, Lora, Recipe, Reconstruct, Schedule
from anchorembed.train.cross_entropy import CHUNK_LOGITS
from anchorembed.train.memory_estimate import Shape, estimate, gb, shape_of, use_of
from anchorembed.train.run import STAGES

TOKENS = 2048  # at once, the least that `auto` takes on a GPU
COLUMNS: list[tuple[str, Contrast | Reconstruct, dict[str, str]]] = [  # title, stage, the recipe's `model`
    ("Stage II, LoRA", Contrast(), {}),
    ("LoRA, bfloat16", Contrast(), {"weights": "bfloat16"}),
    ("LoRA, nf4", Contrast(), {"weights": "nf4"}),
    ("Stage II, all weights", Contrast(lora=None), {}),
    ("Stage I", Reconstruct(), {}),
    ("Stage I, LoRA, bfloat16", Reconstruct(lora=Lora()), {"weights": "bfloat16"}),
]


def config(kind: str, sizes: tuple[int, ...], *, tied: bool = True) -> PretrainedConfig:
    """A configuration of a known model, from hidden and inner size, layers, heads, key heads, head size, vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values: dict[str, Any] = dict(zip((*names, "head_dim", "vocab_size"), sizes, strict=True))
    return AutoConfig.for_model(kind, tie_word_embeddings=tied, **values)


KNOWN = {
    "SmolLM2-135M": config("llama", (576, 1536, 30, 9, 3, 64, 49152)),
    "SmolLM2-360M": config("llama", (960, 2560, 32, 15, 5, 64, 49152)),
    "Qwen3-0.6B": config("qwen3", (1024, 3072, 28, 16, 8, 128, 151936)),
    "Llama-3.2-1B": config("llama", (2048, 8192, 16, 32, 8, 64, 128256)),
    "Qwen3-1.7B": config("qwen3", (2048, 6144, 28, 16, 8, 128, 151936)),
    "Llama-3.2-3B": config("llama", (3072, 8192, 28, 24, 8, 128, 128256)),
    "Qwen3-4B": config("qwen3", (2560, 9728, 36, 32, 8, 128, 151936)),
    "Qwen3-8B": config("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), tied=False),
}


def peak(shape: Shape, settings: Schedule, model: dict[str, str]) -> str:
    """GB of a stage at its peak."""
    values = {"data": {"sources": [{"name": "pairs", "path": "pairs.jsonl"}]}, "output": "run", "model": model}
    recipe: Recipe = parse_recipe(values)
    size = STAGES["contrast" if isinstance(settings, Contrast) else "reconstruct"].step_size(settings, recipe.data)
    use = use_of(recipe, settings, size, torch.bfloat16, CHUNK_LOGITS["cuda"])
    return gb(estimate(shape, replace(use, budget=TOKENS)).total)


def table(models: dict[str, PretrainedConfig]) -> str:
    """The table as Markdown, a row a model."""
    titles = ["model", "weights, billions", "encoding", *(title for title, _, _ in COLUMNS)]
    rows = [titles, ["---"] * len(titles)]
    for name, described in models.items():
        shape = shape_of(described)
        peaks = [peak(shape, settings, model) for _, settings, model in COLUMNS]
        rows.append([name, f"{shape.count / 1e9:.2f}", gb(4 * shape.count), *peaks])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(table({name: load_config(name) for name in sys.argv[1:]} or KNOWN))
