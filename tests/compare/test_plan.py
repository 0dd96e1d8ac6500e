"""A comparison's key covers what decides results, and nothing else; faults are found before anything is trained."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from anchorembed.compare.plan import Comparison, describe, open_comparison
from anchorembed.compare.records import Cell, Cost, GridScore, Run, RunRecord
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.recipe_file import parse_recipe, read_recipe
from anchorembed.recipe_schema import Recipe
from tiny import write_pairs

Make = Callable[..., Recipe]


def cell(comparison: Comparison, run: Run) -> Cell:
    (task,) = comparison.tasks
    return Cell(**asdict(run), choice="", collection=task.name, revision=task.revision, metric="Spearman", value=0.5)


@pytest.mark.parametrize(
    ("own_arm", "message"),
    [
        ({"contrast": {"stepz": 9}}, "stepz"),
        ({"before": {"sinkk": 9}}, "sinkk"),
        ({"before": {"decod": 0}}, "Did you mean 'decode'"),
        ({"contrast": {"dimensions": [4096]}}, r"contrast\.dimensions: 4096 is above 32"),
        ({"contrast": {"distill": 1.0}}, r"contrast\.distill: no pair has given scores"),
        ({"before": {"lora": {"targets": ["nothing"]}}}, r"reconstruct\.lora\.targets: the model has none of nothing"),
        ({"before": {"keep_best": True, "evaluate_every": 0}}, "keep_best: nothing is evaluated"),
        ({"before": {"evaluate_on": [__file__]}}, r"test_plan\.py: unknown format"),
    ],
)
def test_an_arm_s_settings_are_checked_before_anything_is_trained(
    make: Make, tmp_path: Path, own_arm: dict[str, object], message: str
) -> None:
    recipe = make(declared=[], own_arms={"x": {"like": "both"} | own_arm}, arms=["both", "x"])
    with pytest.raises(InputError, match=f"arm x: .*{message}"):
        open_comparison(recipe, tmp_path)


def test_duplicates_removed_keys_negative_seeds_and_a_grid_without_held_out_pairs_are_refused(
    make: Make, tmp_path: Path
) -> None:
    for change in ({"seeds": [0, 0]}, {"arms": ["both", "both"]}, {"declared": ["contrast", "contrast"]}):
        with pytest.raises(InputError, match="stands there twice"):
            make(**change)
    with pytest.raises(InputError, match=r"compare.seeds.1 is -1"):
        make(seeds=[0, -1])
    with pytest.raises(
        InputError, match=r"unknown key 'compare.seeds_of'. All trained arms have compare.seeds. .*extends"
    ):
        make(seeds_of={"both": [1]})
    with pytest.raises(InputError, match=r"unknown key 'compare.own_arms.x.first'. Write `before` instead."):
        make(own_arms={"x": {"like": "both", "first": {"sink": False}}})
    recipe = make(grid=[{}, {"scale": 7}])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0})})
    with pytest.raises(InputError, match=r"data.held_out: 0 with a compare.grid"):
        open_comparison(recipe, tmp_path)


def test_a_comparison_without_one_of_its_sections_is_refused(make: Make, tmp_path: Path) -> None:
    for section, message in (
        ("compare", "it has no compare section"),
        ("reconstruct", "reconstruct is null. A comparison needs both stages"),
        ("contrast", "contrast is null. A comparison needs both stages"),
    ):
        with pytest.raises(InputError, match=message):
            open_comparison(make().model_copy(update={section: None}), tmp_path)


def test_instructions_are_for_any_task_of_the_comparison(make: Make, tmp_path: Path) -> None:
    open_comparison(make(instructions={"s_test": "x", "STS": "y"}), tmp_path)
    with pytest.raises(InputError, match=r"'s_tset' is no task here.* Did you mean 's_test'"):
        open_comparison(make(instructions={"s_tset": "x"}), tmp_path)


def test_hours_left_are_estimated_from_finished_runs_and_trials(make: Make, tmp_path: Path) -> None:
    """One run of an hour and two trials of half an hour are done; five runs and two trials are to come."""
    comparison = open_comparison(make(seeds=[0, 1], grid=[{"scale": 7}, {"scale": 9}]), tmp_path)
    assert "hours to go" not in describe(comparison)
    results, contrast, both = comparison.results, comparison.arm_record("contrast"), comparison.arm_record("both")
    for choice in comparison.record.choices:
        results.append(GridScore("both", both.digest, 0, choice, 0.5, Cost(1800.0)))
    seconds = {"before": 3000.0, "contrast": 500.0, "evaluate": 100.0}
    results.write_record(both.run("own", 0), RunRecord(costs={stage: Cost(spent) for stage, spent in seconds.items()}))
    results.append(cell(comparison, both.run("own", 0)))
    assert "about 6.0 hours to go" in describe(comparison)
    results.write_record(contrast.run("common", 0), RunRecord())
    results.append(cell(comparison, contrast.run("common", 0)))
    assert "about 5.0 hours to go" in describe(comparison)
    for run in comparison.missing():
        results.write_record(run, RunRecord())
        results.append(cell(comparison, run))
    assert "hours to go" not in describe(comparison)


def test_the_key_covers_the_primary_arm_and_the_first_seed(make: Make, tmp_path: Path) -> None:
    def key(rate: float, title: str = "", **compare: object) -> str:
        own = {"mine": {"like": "both", "title": title, "before": {"learning_rate": rate}}}
        arms = ["base", "contrast", "both", "mine"]
        return open_comparison(make(arms=arms, own_arms=own, **compare), tmp_path).results.key

    assert key(1e-3) == key(1e-4)
    assert key(1e-3, primary="mine") != key(1e-4, primary="mine")
    assert key(1e-3, primary="mine") == key(1e-3, title="Other words", primary="mine")
    assert key(1e-3) == key(1e-3, seeds=[0, 1])
    assert key(1e-3) != key(1e-3, seeds=[1, 0])


@pytest.mark.parametrize(
    ("key", "same"),
    [("evaluate_every", True), ("tokens_per_micro_batch", True), ("steps", False), ("bag_weight", False)],
)
def test_settings_that_change_cost_alone_do_not_change_the_key(
    make: Make, tmp_path: Path, key: str, same: bool
) -> None:
    recipe = make()
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={key: 1})})
    keys = [open_comparison(variant, tmp_path).results.key for variant in (recipe, changed)]
    assert (keys[0] == keys[1]) is same


def test_exploratory_tests_do_not_change_the_key(make: Make, tmp_path: Path) -> None:
    explored = make(explore={"contrast": ["base"]})
    keys = [open_comparison(variant, tmp_path).results.key for variant in (make(), explored)]
    assert keys[0] == keys[1]


def test_evaluations_change_the_key_if_they_choose_the_model(make: Make, tmp_path: Path) -> None:
    own = {"best": {"like": "both", "before": {"keep_best": True}}}
    recipe = make(arms=["base", "contrast", "both", "best"], own_arms=own)
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={"evaluate_every": 1})})
    first, second = (open_comparison(variant, tmp_path).results.key for variant in (recipe, changed))
    assert first != second


def test_the_same_model_has_the_same_key_wherever_it_is_and_whatever_its_card_says(
    make: Make, tmp_path: Path, embedder: Embedder
) -> None:
    def key(folder: Path) -> str:
        recipe = make()
        named = recipe.model.model_copy(update={"name": str(folder)})
        return open_comparison(recipe.model_copy(update={"model": named}), tmp_path).results.key

    base = Path(make().model.name)
    assert key(base) == key(shutil.copytree(base, tmp_path / "copy"))
    embedder.save(tmp_path / "saved")
    before = key(tmp_path / "saved")
    for name in ("README.md", "results.json"):  # which `train` writes anew
        (tmp_path / "saved" / name).write_text("[]", encoding="utf-8")
    assert key(tmp_path / "saved") == before


def test_other_weights_change_the_key(make: Make, tmp_path: Path) -> None:
    recipe = make()
    folder = shutil.copytree(recipe.model.name, tmp_path / "model")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})})
    before = open_comparison(recipe, tmp_path).results.key
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert open_comparison(recipe, tmp_path).results.key != before


@pytest.mark.parametrize("own_arm", [False, True])
def test_the_guide_is_in_the_key_by_its_content(make: Make, tmp_path: Path, own_arm: bool) -> None:
    def identity(guide: Path, weights: float = 0.0) -> tuple[str, ...]:
        shutil.copytree(make().model.name, guide)
        saved = load_file(guide / "model.safetensors")
        save_file({name: value + weights for name, value in saved.items()}, guide / "model.safetensors")
        return identity_with(make, tmp_path, {"guide": str(guide), "mask_above": 0.0}, own_arm)

    assert identity(tmp_path / "a") == identity(tmp_path / "b") != identity(tmp_path / "c", weights=1.0)


@pytest.mark.parametrize("own_arm", [False, True])
def test_the_tests_that_choose_a_step_are_in_the_key_by_their_content(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_arm: bool
) -> None:
    def identity(path: str) -> tuple[str, ...]:
        return identity_with(make, tmp_path, {"keep_best": True, "evaluate_on": [path]}, own_arm)

    make()
    monkeypatch.setenv("HERE", str(tmp_path))
    test, copy = tmp_path / "s_test.jsonl", tmp_path / "copy_test.jsonl"
    shutil.copy(test, copy)
    before = identity(str(test))
    assert before == identity("$HERE/copy_test.jsonl")
    copy.write_text(test.read_text(encoding="utf-8").replace("sort 1", "sort 99"), encoding="utf-8")
    assert before != identity(str(copy))


def identity_with(make: Make, folder: Path, contrast: dict[str, object], own_arm: bool) -> tuple[str, ...]:
    """Key and digests of a comparison whose Stage II has these settings, in all arms or in an own arm alone."""
    if own_arm:
        own_arms = {"own": {"like": "contrast", "contrast": contrast}}
        recipe = make(arms=["both", "own"], declared=[], own_arms=own_arms)
    else:
        values = make().model_dump(mode="json", by_alias=True)
        recipe = parse_recipe(values | {"contrast": values["contrast"] | contrast})
    record = open_comparison(recipe, folder).record
    return record.key, *(arm.digest for arm in record.arms)


@pytest.mark.parametrize("name", ["pairs", "model", "guide"])
def test_other_pairs_change_the_key_whatever_their_source_is_called(make: Make, tmp_path: Path, name: str) -> None:
    recipe = make()
    source = recipe.data.sources[0].model_copy(update={"name": name})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": [source]})})
    guided = recipe.contrast.model_copy(update={"guide": recipe.model.name, "mask_above": 0.0})
    recipe = recipe.model_copy(update={"contrast": guided})
    before = open_comparison(recipe, tmp_path).results.key
    write_pairs(Path(source.path), 201)
    assert open_comparison(recipe, tmp_path).results.key != before


def test_paths_may_name_variables(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make().model_dump(mode="json", by_alias=True)
    values["data"]["sources"][0]["path"] = "$ANCHOREMBED_DATA/pairs.jsonl"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("ANCHOREMBED_DATA", str(tmp_path))
    assert read_recipe(tmp_path / "r.yaml").data.sources[0].path == str(tmp_path / "pairs.jsonl")
    comparison = open_comparison(read_recipe(tmp_path / "r.yaml"), tmp_path / "kept")
    assert "path: $ANCHOREMBED_DATA/pairs.jsonl" in comparison.record.recipe
    for part_of_path in (f"/{tmp_path.name}", tmp_path.name):
        monkeypatch.setenv("ANCHOREMBED_DATA", part_of_path)
        assert f"path: {tmp_path}/pairs.jsonl" in open_comparison(make(), tmp_path / "kept").record.recipe
    monkeypatch.delenv("ANCHOREMBED_DATA")
    values["data"]["sources"] += [dict(values["data"]["sources"][0], name=name) for name in "ab"]
    values["data"]["query_tokenz"] = 3
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "r.yaml")
    unset, more, unknown = sorted(str(caught.value).splitlines(), key=lambda line: ("unknown" in line, "more" in line))
    assert "0.path is '$ANCHOREMBED_DATA/pairs.jsonl': it names an environment variable that is not set" in unset
    assert more.endswith(": 2 more values name variables that are not set.")
    assert "query_tokenz" in unknown
