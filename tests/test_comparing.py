"""Arms get equal compute and the same pairs; what is finished is kept and never run again; the report has it all."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from anchorembed import comparing
from anchorembed.arms import READY, choices, contrast_recipe, find_arms, first_recipe, matched_steps, stage_flops
from anchorembed.cli import app
from anchorembed.config import Recipe, parse_recipe, read_recipe
from anchorembed.errors import InputError
from anchorembed.loop import Interrupted
from conftest import write_pairs

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


def test_every_arm_gets_the_primary_one_s_compute(make: Make, tmp_path: Path) -> None:
    recipe = make(arms=list(READY), declared=["contrast"])
    arms = find_arms(recipe.compare)
    steps = matched_steps(recipe, arms)
    assert steps["base"] == steps["contrast"] == 0
    assert steps["both"] == 6
    budget = stage_flops(first_recipe(recipe, READY["both"], 0, 6, tmp_path)) * 6
    for arm in arms:
        own = first_recipe(recipe, arm, 0, steps[arm.name], tmp_path)
        if arm.longer:
            own = contrast_recipe(recipe, arm, 0, {}, None, 0, tmp_path)
            assert contrast_recipe(recipe, arm, 0, {}, None, 9, tmp_path).contrast.steps == 13
        if own is None:
            continue
        of_step = stage_flops(own)
        assert abs(of_step * steps[arm.name] - budget) <= of_step, arm.name
        assert own.compare is None
        assert own.data == recipe.data
    assert steps["q2d"] + steps["d2q"] > 2 * steps["both"]


def test_arms_are_the_recipes_they_say(make: Make, tmp_path: Path) -> None:
    recipe = make(
        arms=["both", "mine"], own_arms={"mine": {"like": "q2d", "first": {"learning_rate": 0.5}, "what": "Mine."}}
    )
    both, mine = find_arms(recipe.compare)
    assert first_recipe(recipe, both, 3, 6, tmp_path).reconstruct == recipe.reconstruct
    derived = first_recipe(recipe, mine, 3, 7, tmp_path)
    assert (derived.seed, derived.reconstruct.steps, derived.reconstruct.directions) == (3, 7, "q2d")
    assert derived.reconstruct.learning_rate == 0.5
    full = first_recipe(recipe, READY["full_contrast"], 0, 9, tmp_path)
    assert full.reconstruct is None
    assert (full.contrast.lora, full.contrast.learning_rate, full.contrast.steps) == (None, 1e-3, 9)
    second = contrast_recipe(recipe, both, 0, {"scale": 7.0}, "there", 5, tmp_path)
    assert (second.contrast.from_, second.contrast.scale, second.contrast.steps) == ("there", 7.0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["both", "contrats"]}, "no arm is called 'contrats'. Did you mean 'contrast'"),
        ({"arms": ["contrast"]}, "'both' is not among compare.arms"),
        ({"own_arms": {"both": {"like": "q2d"}}}, "'both' is a ready arm"),
        ({"declared": ["nothing"]}, "compare.declared: no arm is called 'nothing'"),
    ],
)
def test_unknown_arms_are_refused(make: Make, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_arms(make(**change).compare)


def test_a_choice_takes_from_the_recipe_what_it_leaves_out(make: Make) -> None:
    own = {"learning_rate": 1e-3, "warmup_steps": 2, "scale": 50.0}
    assert choices(make()) == [own]
    assert choices(make(grid=[{"learning_rate": 1e-4, "scale": 20}, {}, {"warmup_steps": 2}])) == [
        {"learning_rate": 1e-4, "warmup_steps": 2, "scale": 20.0},
        own,
    ]


def test_a_comparison_from_recipe_to_report(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make(grid=[{"learning_rate": 1e-3}, {"learning_rate": 1e-2}])
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    command = ["compare", str(path), "--results", str(tmp_path / "kept")]
    app([*command, "--plan"], standalone_mode=False)
    assert "4 runs, 0 of them done; 2 choices" in capfd.readouterr().err
    app([*command, "--hours", "0"], standalone_mode=False)
    assert "4 runs are still to do" in capfd.readouterr().err
    app(command, standalone_mode=False)
    lines = [json.loads(line) for line in (tmp_path / "kept" / "results.jsonl").read_text("utf-8").splitlines()]
    cells = [(line["arm"], line["setting"], line["seed"]) for line in lines if line["kind"] == "cell"]
    assert sorted(cells) == [("base", "own", 0), ("both", "own", 0), ("contrast", "common", 0), ("contrast", "own", 0)]
    assert sorted((line["arm"], line["choice"]) for line in lines if line["kind"] == "grid") == [
        (arm, f"learning_rate={rate}-warmup_steps=2-scale=50") for arm in ("both", "contrast") for rate in (0.001, 0.01)
    ]
    both = next(line for line in lines if line["kind"] == "cell" and line["arm"] == "both")
    assert both["cost"]["first"]["flops"] > both["cost"]["contrast"]["flops"] > 0
    assert all(both["cost"][stage]["seconds"] > 0 for stage in ("first", "contrast", "evaluate"))
    page, text = ((tmp_path / "kept" / name).read_text("utf-8") for name in ("report.html", "report.md"))
    for words in ("Both + contrastive", "Contrastive only", "s_test", "Exploratory", "gain"):
        assert words in page, words
    assert f"{both['value']:.3f}" in text

    shutil.rmtree(tmp_path / "run")  # as on another machine, which has the results only
    capfd.readouterr()
    app([*command, "--report"], standalone_mode=False)
    app(command, standalone_mode=False)
    assert "4 runs, 4 of them done" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    again = [json.loads(line) for line in (tmp_path / "kept" / "results.jsonl").read_text("utf-8").splitlines()]
    assert again == lines

    changed = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update={"steps": 5})})
    other = comparing.open_comparison(changed, tmp_path / "kept")
    assert len(other.missing()) == 4
    assert "are of other settings" in comparing.plan(other)


def test_damaged_results_are_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"key": "x"}\n{"cut sho', encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.jsonl:2: damaged"):
        comparing.open_comparison(make(), tmp_path)


@pytest.mark.parametrize(
    ("key", "same"), [("evaluate_every", True), ("tokens_per_micro_batch", True), ("steps", False)]
)
def test_what_only_costs_makes_no_other_comparison(make: Make, tmp_path: Path, key: str, same: bool) -> None:
    recipe = make()
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={key: 1})})
    found = [comparing.open_comparison(one, tmp_path).results.key for one in (recipe, changed)]
    assert (found[0] == found[1]) is same


def test_evaluations_that_choose_a_model_decide(make: Make, tmp_path: Path) -> None:
    own = {"best": {"like": "both", "first": {"keep_best": True}}}
    recipe = make(arms=["base", "contrast", "both", "best"], own_arms=own)
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={"evaluate_every": 1})})
    first, second = (comparing.open_comparison(one, tmp_path).results.key for one in (recipe, changed))
    assert first != second


@pytest.mark.parametrize("code", [143, -signal.SIGTERM])
def test_a_stopped_training_is_no_fault(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whether the training could still write a checkpoint or was not ready for signals yet."""
    monkeypatch.setattr(comparing, "_wait", lambda process: (process.kill(), code)[1])
    with pytest.raises(Interrupted) as caught:
        comparing.run(comparing.open_comparison(make(arms=["both"], declared=["both"]), tmp_path), lambda _: None)
    assert caught.value.signal == signal.SIGTERM


def test_paths_may_name_variables(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make().model_dump(mode="json", by_alias=True)
    values["data"]["sources"][0]["path"] = "$ANCHOREMBED_DATA/pairs.jsonl"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("ANCHOREMBED_DATA", str(tmp_path))
    assert read_recipe(tmp_path / "r.yaml").data.sources[0].path == tmp_path / "pairs.jsonl"
    monkeypatch.delenv("ANCHOREMBED_DATA")
    with pytest.raises(InputError, match="environment variable that is not set"):
        read_recipe(tmp_path / "r.yaml")
