"""The recipe in an output folder is what was trained there, wherever it is read from; a user's own file stays."""

import re
from pathlib import Path

import pytest

from anchorembed.compare.controls import ArmRecipe
from anchorembed.errors import InputError
from anchorembed.recipe_file import parse_recipe, read_as, read_recipe
from anchorembed.train.kept_recipe import KEPT, check_kept, keep_recipe, with_absolute_paths
from anchorembed.train.run import train
from tiny import recipe_values, write_pairs

STAGE = {"steps": 2, "batch_size": 4, "warmup_steps": 1}


def test_paths_are_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    for name in ("test", "smollm2-135m"):  # a folder of that name is not the default model
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    stage = STAGE | {"evaluate_on": ["test", "NFCorpus"], "from": "test"}
    values = recipe_values(Path("pairs.jsonl"), Path("smollm2-135m"), Path("run")) | {"contrast": stage}
    values["data"]["sources"].append({"name": "hub", "path": "hf://owner/name"})
    values["compare"] = {
        "own_arms": {"guided": {"like": "both", "contrast": {"mask_above": 0.0, "guide": "test"}}},
        "collections": {"Table": ["test"]},
    }
    recipe = parse_recipe(values)
    keep_recipe(recipe)
    monkeypatch.chdir("/")
    kept = read_recipe(tmp_path / "run" / KEPT)
    assert [source.path for source in kept.data.sources] == [str(tmp_path / "pairs.jsonl"), "hf://owner/name"]
    assert (kept.model.name, kept.output) == ("smollm2-135m", tmp_path / "run")
    assert kept.contrast is not None
    assert (kept.contrast.evaluate_on, kept.contrast.from_) == (
        [str(tmp_path / "test"), "NFCorpus"],
        "/".join([str(tmp_path), "test"]),
    )
    assert kept.compare is not None
    assert kept.compare.own_arms["guided"].contrast["guide"] == kept.contrast.from_
    assert kept.compare.collections == {"Table": [kept.contrast.from_]}
    assert with_absolute_paths(kept) == kept


def test_another_run_replaces_it_and_a_users_file_stays(tmp_path: Path, said: list[str]) -> None:
    recipe = parse_recipe(recipe_values(tmp_path / "pairs.jsonl", tmp_path, tmp_path / "my run"))
    path = tmp_path / "my run" / KEPT
    keep_recipe(recipe)
    assert path.read_text(encoding="utf-8").partition("\n")[0].endswith(f": anchorembed train '{path}'")
    other = recipe.model_copy(update={"seed": 7})
    message = (
        r"is not the recipe that this command makes: seed is 0 there, 7 here\. To .*: anchorembed train '.*my run/"
    )
    with pytest.raises(InputError, match=message):
        check_kept(other)
    keep_recipe(other)
    check_kept(other)
    assert read_recipe(path).seed == 7
    path.write_text(own := path.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    keep_recipe(other)
    assert said == [], "it says the same"
    keep_recipe(recipe)
    assert said == [f"{path}: not written by anchorembed, and differs from the recipe that is trained. It stays."]
    assert path.read_text(encoding="utf-8") == own


def test_keys_that_differ_from_the_kept_recipe_are_named(tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "pairs.jsonl", tmp_path, tmp_path / "run") | {"contrast": STAGE}
    keep_recipe(parse_recipe(values | {"reconstruct": {}}))
    with pytest.raises(InputError) as refused:
        check_kept(parse_recipe(values, overrides=["contrast.steps=3", "contrast.lora.rank=4", "data.held_out=9"]))
    said = str(refused.value)
    for words in (
        "contrast.steps is 2 there, 3 here;",
        "contrast.lora.rank is 16 there, 4 here",
        "held_out is 8 there",
    ):
        assert words in said
    assert re.search(r"reconstruct is \{'steps': 2000, .{80,90}\.\.\. there, None here", said), "it is cut"
    (tmp_path / "run" / KEPT).write_text("sed: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)unknown key 'sed'.*delete that file, or choose another --output"):
        check_kept(parse_recipe(values))


def test_an_arm_of_a_comparison_keeps_its_own_keys(tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "pairs.jsonl", tmp_path, tmp_path / "run")
    arm = ArmRecipe.model_validate(values | {"reconstruct": STAGE | {"directions": "next_token"}})
    keep_recipe(arm)
    assert read_as(ArmRecipe, tmp_path / "run" / KEPT) == with_absolute_paths(arm)


@pytest.mark.slow
def test_a_run_keeps_what_it_ran_and_a_refused_one_changes_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    values = recipe_values(write_pairs(tmp_path / "pairs.jsonl"), tiny_folder, tmp_path / "run") | {"contrast": STAGE}
    recipe = parse_recipe(values)
    train(recipe)
    path = tmp_path / "run" / KEPT
    assert read_recipe(path) == with_absolute_paths(recipe)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"contrast.steps was 2, is 3 now"):
        train(parse_recipe(values | {"contrast": STAGE | {"steps": 3}}))
    assert path.read_bytes() == before
    train(path)
    assert path.read_bytes() == before
