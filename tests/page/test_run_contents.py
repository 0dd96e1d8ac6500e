"""A run's page has the run's models and pairs that were not trained on; what cannot be shown is said."""

import json
import re
import shutil
from math import log2
from pathlib import Path

import pytest
import yaml

from anchorembed import api
from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.evaluate.held_out import pair_search, search_by_embedder
from anchorembed.model.metadata import METADATA
from anchorembed.page.run_contents import collection_of, find_models, page_of_run
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.kept_recipe import keep_recipe
from anchorembed.train.prepare import load_to_measure
from anchorembed.train.verdict import conclude, held_out_pairs
from tiny import recipe_values, write_pairs


def test_pairs_become_a_test_without_repeated_texts() -> None:
    own = (None, False)
    made, _ = collection_of([(pair, own) for pair in (TextPair("a", "x"), TextPair("a", "y"), TextPair("b", "x"))])
    assert [document.text for document in made.documents] == ["x", "y"]
    assert [query.text for query in made.queries] == ["a", "b"]
    assert made.qrels == {"q0": {"d0": 1, "d1": 1}, "q1": {"d0": 1}}
    with pytest.raises(InputError, match="held-out pairs: 1, and a page shows at least 2"):
        collection_of([(TextPair("a", "x"), own)])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained model is there"):
        find_models(tmp_path)


def test_the_model_before_training_is_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(recipe: Recipe, model: str) -> None:
        raise InputError(f"loads {model}")

    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(recipe_values(write_pairs(Path("pairs.jsonl")), Path("base"), tmp_path / "run"))
    keep_recipe(recipe)
    template = {"bos": "", "header": "", "suffix": "", "end": "</s>"}
    record = {"template": template, "lengths": {"query": 8, "document": 8}, "prompts": {}, "history": {"start": "base"}}
    model = tmp_path / "run" / "contrast" / "model"
    model.mkdir(parents=True)
    (model / METADATA).write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.chdir("/")
    monkeypatch.setattr("anchorembed.page.run_contents.load_to_measure", load)
    with pytest.raises(InputError, match=f"loads {tmp_path / 'base'}"):
        page_of_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sources",
    [
        pytest.param([{"symmetric": False}], id="one-instruction"),
        pytest.param([{"symmetric": True}], id="symmetric"),
        pytest.param([{}, {"instruction": "something else to look for"}], id="two-instructions"),
    ],
)
def test_the_page_measures_models_as_the_verdict_does(
    run: Recipe, sources: list[dict[str, object]], tmp_path: Path
) -> None:
    output = shutil.copytree(run.output, tmp_path / "run")
    values = run.model_dump(mode="json", by_alias=True) | {"output": str(output)}
    files = [run.data.sources[0].path, write_pairs(tmp_path / "more.jsonl", 120, seed=5)]
    values["data"]["sources"] = [
        {"name": f"s{number}", "path": str(path)} | source
        for number, (path, source) in enumerate(zip(files, sources, strict=False))
    ]
    recipe = parse_recipe(values)
    (output / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (verdict,) = conclude(recipe, output / "contrast" / "model")
    shown, _ = page_of_run(output)
    rows = [shown.rows[name]["nDCG@10"] for name in ("before training", "Stage II")]
    assert rows == pytest.approx([verdict.before, verdict.trained])
    test = pair_search(held_out_pairs(recipe))
    ndcg = search_by_embedder(test, load_to_measure(recipe, str(output / "contrast" / "model")))
    by_query = {text: score for (_, text), score in zip(test.queries, ndcg, strict=True)}
    for search in shown.searches:
        rank = search.ranks["Stage II"]
        assert by_query[search.query] == pytest.approx(1 / log2(rank + 1) if rank <= 10 else 0)


@pytest.mark.slow
def test_a_run_gives_its_page(run: Recipe, tiny_folder: Path, tmp_path: Path) -> None:
    assert find_models(run.output) == {
        "before training": str(tiny_folder),
        "Stage I": str(run.output / "reconstruct" / "model"),
        "Stage II": str(run.output / "contrast" / "model"),
    }
    written = api.page(run.output)
    assert written == run.output / "page.html"
    by_recipe = api.page(run.output / "recipe.yaml", out=tmp_path / "page.html")
    assert by_recipe.read_text(encoding="utf-8") == written.read_text(encoding="utf-8")
    pairs = run.data.sources[0].path
    assert "were trained on" not in written.read_text(encoding="utf-8")
    seen = api.page(run.output, pairs=pairs, out=tmp_path / "seen.html").read_text(encoding="utf-8")
    assert re.search(r"\d+ of these 120 pairs were trained on: their results say nothing of new texts", seen)
    moved = (run.output / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    try:
        with pytest.raises(InputError, match=r"no recipe.yaml that says .* --pairs FILE"):
            api.page(run.output)
        other = api.page(run.output, pairs=pairs, out=tmp_path / "other.html").read_text(encoding="utf-8")
    finally:
        moved.rename(run.output / "recipe.yaml")
    assert "120 documents" in other
