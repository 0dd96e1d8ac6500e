"""Training ends with a verdict: against the model before it and BM25, measured once, the same when it is repeated."""

import json
from pathlib import Path
from typing import Any

import pytest

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.evaluate.difference import Difference
from anchorembed.evaluate.held_out import pair_search, search_by_embedder
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train import verdict as verdicts
from anchorembed.train.run import contrast, train
from anchorembed.train.verdict import VERDICT, find_tests
from judged_files import write_test_files
from tiny import recipe_values, write_pairs

STAGE: dict[str, Any] = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "evaluate_every": 0, "learning_rate": 3e-3}


def make(folder: Path, model: Path, pairs: int = 80, held_out: int = 8, **contrast: Any) -> Recipe:
    path = folder / "pairs.jsonl"
    if not path.exists():
        write_pairs(path, pairs)
    stages = {"reconstruct": None, "contrast": STAGE | contrast}
    return parse_recipe(recipe_values(path, model, folder / "run", held_out) | stages)


def read(recipe: Recipe) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads((recipe.output / VERDICT).read_text(encoding="utf-8"))
    return verdict


def test_what_is_measured_is_the_model_before_and_after(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = make(tmp_path, tiny_folder)
    model = train(recipe)
    (test,) = read(recipe)["tests"]
    pairs = find_tests(recipe).pairs
    assert pairs is not None
    assert test["items"] == len(pairs.queries) == 8
    for name, folder in (("before", tiny_folder), ("trained", model)):
        scores = search_by_embedder(pairs, Embedder.load(folder, precision="float32", lengths=Lengths(24, 48)))
        assert test[name] == pytest.approx(sum(scores) / 8)
    assert test["bm25"] > 0.9, "each positive repeats its query's words"
    assert test["against_before"]["value"] == pytest.approx(test["trained"] - test["before"])
    assert test["against_bm25"]["verdict"] in ("worse", "cannot be told")


@pytest.mark.slow
def test_training_that_helps_and_training_that_harms(tmp_path: Path, tiny_folder: Path, said: list[str]) -> None:
    recipe = make(tmp_path, tiny_folder, 300, 30, steps=60, lora=None)
    train(recipe)
    (helped,) = read(recipe)["tests"]
    assert helped["against_before"]["verdict"] == "better"
    assert [line for line in said if line.startswith("  better than before training: +0.")]
    assert recipe.contrast is not None
    changes = {"from_": str(recipe.output / "contrast" / "model"), "learning_rate": 3.0}
    again = recipe.contrast.model_copy(update=changes)
    spoilt = recipe.model_copy(update={"contrast": again, "output": tmp_path / "spoilt"})
    train(spoilt)
    (harmed,) = read(spoilt)["tests"]
    assert harmed["before"] == pytest.approx(helped["trained"]), "before is what the recipe starts from"
    assert harmed["against_before"]["verdict"] == "worse"
    assert [line for line in said if line.startswith("  worse than before training: -0.")]


def test_each_is_measured_once(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    recipe = make(tmp_path, tiny_folder)
    measured: list[str] = []
    real = verdicts._by_model
    monkeypatch.setattr(verdicts, "_by_model", lambda *given: measured.append(given[2]) or real(*given))
    model = train(recipe)
    first, lines = read(recipe), said[-3:]
    (recipe.output / VERDICT).unlink()
    train(recipe)
    assert measured == [str(tiny_folder), str(model)]
    assert read(recipe) == first
    assert said[-3:] == lines
    (recipe.output / "verdict" / "before.json").write_text('{"key"', encoding="utf-8")  # as a full disk leaves it
    train(recipe)
    assert measured[2:] == [str(tiny_folder)]
    assert read(recipe) == first


def test_a_test_that_changed_is_measured_again(tmp_path: Path, tiny_folder: Path) -> None:
    tests = find_tests(make(tmp_path, tiny_folder))
    other = pair_search([(TextPair("a", "b"), (None, False)), (TextPair("c", "d"), (None, False))])
    assert tests.digest != verdicts.Tests(other, ()).digest != verdicts.Tests(None, ()).digest


def test_tests_of_one_s_own_are_in_the_verdict(tmp_path: Path, tiny_folder: Path, said: list[str]) -> None:
    data = write_test_files(tmp_path / "data")
    names = [str(data / "beir"), str(data / "pairs.jsonl")]
    recipe = make(tmp_path, tiny_folder, evaluate_on=names)
    train(recipe)
    by_name = {test["test"]: test for test in read(recipe)["tests"]}
    assert set(by_name) == {"held-out pairs", "beir", "pairs"}
    assert by_name["beir"]["items"] == 12
    assert by_name["beir"]["bm25"] is not None
    assert by_name["pairs"]["against_before"] is None, "average precision is no mean over pairs"
    assert by_name["pairs"]["bm25"] is None
    assert any("has no score of each item" in line for line in said)


def test_without_bm25_it_says_what_to_install(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def missing(_: object) -> None:
        raise InputError("bm25s: this package is not installed. To install it: pip install 'anchorembed[mine]'")

    recipe = make(tmp_path, tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "by_bm25", missing)
        train(recipe)
    assert read(recipe)["tests"][0]["bm25"] is None
    assert said[-1].startswith("BM25 is left out. bm25s: this package is not installed. To install it: pip install")
    train(recipe)
    assert read(recipe)["tests"][0]["bm25"] > 0.9, "measured once it is there"


def test_too_few_pairs_are_no_test(tmp_path: Path, tiny_folder: Path, said: list[str]) -> None:
    recipe = make(tmp_path, tiny_folder, held_out=1)
    train(recipe)
    assert read(recipe)["tests"] == []
    assert "fewer than 2 pairs are held out. To tell a difference takes 6 queries or more. Bring 60 pairs" in said[-1]


def test_a_difference_that_cannot_be_told_has_reason_and_cure(
    tmp_path: Path, tiny_folder: Path, said: list[str]
) -> None:
    train(make(tmp_path, tiny_folder, 30))
    counts = "data: 27 pairs to train on, 3 held out (at most a tenth; data.held_out is 8), of 30"
    assert counts in said
    assert said[-1] == (
        "  3 queries were held out; any difference takes 6 or more to tell, a small one hundreds. Bring 60 pairs "
        "or more (held out are at most a tenth of all and at most data.held_out), or name tests in "
        "contrast.evaluate_on."
    )


@pytest.mark.parametrize(
    ("test", "cure"), [(verdicts.HELD_OUT, "Bring more pairs (held"), ("mine", "Name a larger test")]
)
def test_the_cure_fits_the_test(test: str, cure: str) -> None:
    def lines(difference: Difference) -> list[str]:
        return verdicts.verdict_lines([verdicts.TestVerdict(test, "nDCG@10", 8, 0.6, 0.5, None, difference, None)])

    assert cure in lines(Difference(0.1, -0.1, 0.3, 0.5))[-1]
    assert len(lines(Difference(0.1, 0.05, 0.3, 0.01))) == 2


def test_no_more_than_some_pairs_are_compared(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "_MOST_PAIRS", 3)
    pairs = find_tests(make(tmp_path, tiny_folder)).pairs
    assert pairs is not None
    assert len(pairs.queries) == 3


def test_a_stage_alone_has_no_verdict(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = make(tmp_path, tiny_folder)
    contrast(recipe)
    assert not (recipe.output / VERDICT).exists()
