"""With the real default LLM: it is what it should be, and a few steps of both stages bring the loss down."""

import json
from pathlib import Path

import pytest

from anchorembed.model.embedder import Embedder
from anchorembed.model.load import default_model_folder
from anchorembed.model.template import Template
from anchorembed.recipe_file import parse_recipe
from anchorembed.train.run import train
from tiny import write_pairs

pytestmark = pytest.mark.default_model


def test_template_of_the_default_model() -> None:
    embedder = Embedder.load("smollm2-135m")
    assert embedder.metadata.template == Template("", "<|im_start|>user\n", "", "<|im_end|>")
    assert embedder.pairs.end_id == 2
    assert embedder.tokenizer("hello")["input_ids"] == [1, 4093, 198, 28120, 2]
    assert embedder.dimension == 576


def test_a_few_steps_bring_the_loss_down(tmp_path: Path) -> None:
    stage = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "decay": "none", "evaluate_every": 0}
    recipe = parse_recipe(
        {
            "data": {
                "sources": [{"name": "p", "path": str(write_pairs(tmp_path / "pairs.jsonl", 4))}],
                "query_tokens": 16,
                "document_tokens": 24,
                "held_out": 0,
            },
            "model": {"name": str(default_model_folder())},
            "reconstruct": stage | {"learning_rate": 1e-4},
            "contrast": stage | {"learning_rate": 3e-4, "lora": {"dropout": 0.0}},
            "output": str(tmp_path / "run"),
        }
    )
    model = train(recipe)
    for name in ("reconstruct", "contrast"):
        text = (model.parents[1] / name / "log.jsonl").read_text(encoding="utf-8")
        losses = [json.loads(line)["loss"] for line in text.splitlines()]
        assert losses[-1] < losses[0], name
