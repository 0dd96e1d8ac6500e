"""A saved embedder's hash in a plan changes with each file that its vectors depend on, and with nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import METADATA
from anchorembed.recipe_file import parse_recipe
from anchorembed.train.kept_recipe import with_absolute_paths
from anchorembed.train.resume_plan import model_content, plan_of
from tiny import recipe_values, write_pairs


@pytest.mark.parametrize(
    ("file", "change", "counts"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, True),
        ("config.json", {"rms_norm_eps": 1e-2}, True),
        (METADATA, {"prompts": {"query": "find ", "document": ""}}, True),
        (METADATA, {"weights_sha256": "0"}, True),
        (METADATA, {"history": {"base": "another"}}, False),
        ("config.json", {"transformers_version": "5.0"}, False),
    ],
)
def test_each_file_of_a_saved_embedder_that_decides_vectors_counts(
    file: str, change: dict[str, Any], counts: bool, embedder: Embedder, tmp_path: Path
) -> None:
    embedder.save(tmp_path)
    before = model_content(str(tmp_path))
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert (model_content(str(tmp_path)) != before) == counts


def test_the_default_model_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output folder may have its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert model_content(DEFAULT_MODEL) == DEFAULT_MODEL
    values = recipe_values(tmp_path / "pairs.jsonl", Path(DEFAULT_MODEL), tmp_path / "run")
    assert with_absolute_paths(parse_recipe(values)).model.name == DEFAULT_MODEL


@pytest.mark.parametrize(("lora", "counts"), [(None, False), ({}, True)])
def test_stored_weights_count_where_adapters_train_on_them(
    lora: dict[str, int] | None, counts: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """All weights train in float32 alone, whatever a later Stage II has."""
    values = recipe_values(write_pairs(tmp_path / "pairs.jsonl", 20), tiny_folder, tmp_path / "run")
    plans = []
    for weights in ("bfloat16", "nf4"):
        changed = {"model": values["model"] | {"weights": weights}, "reconstruct": {"lora": lora}}
        recipe = parse_recipe(values | changed)
        assert recipe.reconstruct is not None
        plans.append(plan_of(recipe, "reconstruct", recipe.reconstruct, str(tiny_folder)))
    assert (plans[0] != plans[1]) == counts


@pytest.mark.parametrize("keep_best", [True, False])
def test_tests_that_choose_a_step_are_in_the_plan_by_their_content(
    keep_best: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)

    def plan(name: str, score: int) -> dict[str, object]:
        rows = [{"sentence1": f"sort {n}", "sentence2": "list", "score": n * score} for n in range(3)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        stage = {"keep_best": keep_best, "evaluate_on": [str(tmp_path / name)]}
        recipe = parse_recipe(recipe_values(pairs, tiny_folder, tmp_path / "run") | {"contrast": stage})
        assert recipe.contrast is not None
        return plan_of(recipe, "contrast", recipe.contrast, str(tiny_folder))

    before = plan("a_test.jsonl", 1)
    assert before == plan("b_test.jsonl", 1)
    assert (before != plan("a_test.jsonl", 2)) == keep_best
