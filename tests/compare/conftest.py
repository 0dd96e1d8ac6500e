"""A small comparison that every test may ask for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from tiny import recipe_values, write_pairs

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, tiny_folder: Path) -> Make:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 200)
    rows = [{"sentence1": f"sort {n}", "sentence2": f"list {n % 7}", "score": n % 5} for n in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "s_test.jsonl").write_text(text, encoding="utf-8")

    def build(**compare: object) -> Recipe:
        stage = {"batch_size": 8, "warmup_steps": 2, "evaluate_every": 3, "learning_rate": 1e-3}
        values = recipe_values(pairs, tiny_folder, tmp_path / "run") | {
            "reconstruct": stage | {"steps": 6},
            "contrast": stage | {"steps": 4, "lora": {"rank": 2, "alpha": 4}},
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
