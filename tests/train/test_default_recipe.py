"""The recipe of pairs alone names its sources by their files, and says where queries get no instruction."""

from pathlib import Path

import pytest

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.train.default_recipe import recipe_of_pairs, say_instruction
from tiny import write_pairs


def test_a_hidden_file_is_named_by_its_path(tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / ".x.jsonl"))
    (source,) = recipe_of_pairs([path], "base", tmp_path / "run").data.sources
    assert source.name == path


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match=r"p\.jsonl is named twice"):
        recipe_of_pairs([path, path], "base", tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["batch_size=32"], 96),
        (["batch_size=64"], 48),
        (["steps=50"], 50),
        (["epochs=0.5"], 16),
        (["epochs=100", "batch_size=64"], 1600),
        (["steps=50", "epochs=0.5"], 16),
        (["epochs=0.5", "steps=50"], 50),
    ],
)
def test_steps_follow_what_is_given_and_a_tenth_of_them_is_warm_up(
    tmp_path: Path, given: list[str], steps: int
) -> None:
    paths = [str(write_pairs(tmp_path / "p.jsonl", 1024))]
    overrides = [f"contrast.{change}" for change in given]
    contrast = recipe_of_pairs(paths, "base", tmp_path / "run", overrides).contrast
    assert contrast is not None
    assert (contrast.batch_size, contrast.warmup_steps) == (64 if "batch_size=64" in given else 32, steps // 10)
    assert contrast.epochs is not None or contrast.steps == steps


def test_stage_two_can_be_left_out(tmp_path: Path) -> None:
    paths = [str(write_pairs(tmp_path / "p.jsonl"))]
    recipe = recipe_of_pairs(paths, "base", tmp_path / "run", ["contrast=null", "reconstruct.steps=5"])
    assert recipe.contrast is None
    assert recipe.reconstruct is not None
    assert recipe.reconstruct.steps == 5


@pytest.mark.parametrize("own", ["", "Find the answer"])
def test_that_queries_get_no_instruction_is_said_unless_they_do(
    own: str, tiny_folder: Path, tmp_path: Path, said: list[str]
) -> None:
    Embedder.load(tiny_folder, instruction=own).save(tmp_path / "trained", {})
    pairs = [str(write_pairs(tmp_path / "p.jsonl"))]
    say_instruction(recipe_of_pairs(pairs, str(tiny_folder), tmp_path, ["data.instruction=x"]))
    assert not any("instruction" in message for message in said)
    say_instruction(recipe_of_pairs(pairs, str(tmp_path / "trained"), tmp_path))
    assert any("queries get no instruction; to give one: --set" in message for message in said) == (not own)
    said.clear()
    say_instruction(recipe_of_pairs(pairs, str(tiny_folder), tmp_path))
    assert any("queries get no instruction; to give one: --set" in message for message in said)
