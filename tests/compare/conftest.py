"""A small comparison that every test may ask for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorembed.config import Recipe, parse_recipe
from tiny import write_pairs

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, tiny_folder: Path) -> Make:
    write_pairs(tmp_path / "pairs.jsonl", 200)
    rows = [{"sentence1": f"sort {n}", "sentence2": f"list {n % 7}", "score": n % 5} for n in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "s_test.jsonl").write_text(text, encoding="utf-8")

    def build(**compare: object) -> Recipe:
        stage = {"batch_size": 8, "warmup_steps": 2, "evaluate_every": 3, "learning_rate": 1e-3}
        values = {
            "data": {
                "sources": [{"name": "pairs", "path": str(tmp_path / "pairs.jsonl")}],
                "query_tokens": 24,
                "document_tokens": 48,
                "held_out": 8,
            },
            "model": {"name": str(tiny_folder), "precision": "float32", "device": "cpu"},
            "reconstruct": stage | {"steps": 6},
            "contrast": stage | {"steps": 4, "lora": {"rank": 2, "alpha": 4}},
            "output": str(tmp_path / "run"),
            "compare": {
                "arms": ["base", "contrast", "both"],
                "declared": ["contrast"],
                "seeds": [0],
                "collections": {"Similar": [str(tmp_path / "s_test.jsonl")]},
            }
            | compare,
        }
        return parse_recipe(values)

    return build
