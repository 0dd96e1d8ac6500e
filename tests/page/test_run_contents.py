"""A run's page has the run's models and pairs that were not trained on; what cannot be shown is said."""

import json
import re
from pathlib import Path

import pytest

from anchorembed import api
from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.page.contents import Page
from anchorembed.page.run_contents import collection_of, find_models
from anchorembed.recipe_schema import Recipe
from anchorembed.train.verdict import VERDICT


def test_pairs_become_a_test_without_repeated_texts() -> None:
    made = collection_of([TextPair("a", "x"), TextPair("a", "y"), TextPair("b", "x")])
    assert [document.text for document in made.documents] == ["x", "y"]
    assert [query.text for query in made.queries] == ["a", "b"]
    assert made.qrels == {"q0": {"d0": 1, "d1": 1}, "q1": {"d0": 1}}
    with pytest.raises(InputError, match="held-out pairs: 1, and a page shows at least 2"):
        collection_of([TextPair("a", "x")])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained model is there"):
        find_models(tmp_path)


@pytest.mark.slow
def test_the_page_measures_models_as_the_verdict_does(run: Recipe, page: Page) -> None:
    (verdict,) = json.loads((run.output / VERDICT).read_text(encoding="utf-8"))["tests"]
    shown = [page.rows[name]["nDCG@10"] for name in ("before training", "Stage II")]
    assert shown == pytest.approx([verdict["before"], verdict["trained"]])


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
