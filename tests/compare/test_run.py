"""Arms get equal compute and the same pairs; what is finished is kept and never run again; the report has it all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from anchorembed.cli import app
from anchorembed.compare import arms as arms_module
from anchorembed.compare import gather as gathering
from anchorembed.compare import run as comparing
from anchorembed.compare.arms import (
    READY,
    choices,
    contrast_recipe,
    find_arms,
    first_recipe,
    matched_steps,
    stage_flops,
)
from anchorembed.config import Recipe, Reconstruct, parse_recipe, read_recipe
from anchorembed.errors import InputError
from anchorembed.evaluate.tasks import Task, TaskEmbedder, TaskScore
from anchorembed.model.embedder import METADATA
from anchorembed.system.files import alone_in
from anchorembed.train import run as training
from anchorembed.train.loop import Interrupted
from anchorembed.train.prepare import Prepared, prepare
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


def test_every_arm_gets_the_primary_one_s_compute(make: Make, tmp_path: Path) -> None:
    recipe = make(arms=list(READY), declared=["contrast"])
    arms = find_arms(recipe.compare)
    steps = matched_steps(recipe, arms)
    assert steps["base"] == steps["contrast"] == 0
    assert steps["both"] == 6

    def alone(derived: Recipe) -> float:
        return stage_flops(derived, prepare(derived, derived.model.name))

    budget = alone(first_recipe(recipe, READY["both"], 0, 6, tmp_path)) * 6
    for arm in arms:
        own = first_recipe(recipe, arm, 0, steps[arm.name], tmp_path)
        if arm.longer:
            own = contrast_recipe(recipe, arm, 0, {}, None, 0, tmp_path)
            assert contrast_recipe(recipe, arm, 0, {}, None, 9, tmp_path).contrast.steps == 13
        if own is None:
            continue
        of_step = alone(own)
        assert abs(of_step * steps[arm.name] - budget) <= of_step, arm.name
        assert own.compare is None
        assert own.data == recipe.data
    assert steps["q2d"] + steps["d2q"] > 2 * steps["both"]


def test_compute_is_counted_on_the_first_seed_s_pairs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever seed the recipe has for training it alone."""
    prepare, seeds = arms_module.prepare, []

    def spy(recipe: Recipe, *rest: Any) -> Prepared:
        seeds.append(recipe.seed)
        return prepare(recipe, *rest)

    monkeypatch.setattr(arms_module, "prepare", spy)
    recipe = make(seeds=[3, 4])
    matched_steps(recipe.model_copy(update={"seed": 9}), find_arms(recipe.compare))
    assert seeds == [3]


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
        ({"declared": ["both"]}, "'both' is compare.primary"),
        ({"explore": {"contrast": ["basis"]}}, "compare.explore: no arm is called 'basis'. Did you mean 'base'"),
        ({"explore": {"both": ["contrast"]}}, "compare.explore: 'both' is compare.primary, tested against all others"),
        ({"explore": {"contrast": ["contrast"]}}, "compare.explore: 'contrast' is in its own list"),
        (
            {"own_arms": {"x": {"like": "base", "contrast": {"scale": 9}}}},
            "x.contrast.scale: no arm may set it, as base",
        ),
        ({"declared": ["nothing"]}, "compare.declared: no arm is called 'nothing'"),
        (
            {"own_arms": {"x": {"like": "contrast", "first": {"sink": False}}}},
            "x.first.sink: no arm may set it, as contrast",
        ),
        (
            {"own_arms": {"x": {"like": "both", "first": {"steps": 9}}}},
            "x.first.steps: no arm may set it, as steps follow",
        ),
        ({"own_arms": {"x": {"like": "full_contrast", "first": {"from": "y"}}}}, "x.first.from: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "contrast": {"steps": 9}}}}, "x.contrast.steps: no arm may set it"),
        ({"own_arms": {"x": {"like": "both", "contrast": {"from": "y"}}}}, "x.contrast.from: no arm may set it"),
        (
            {"own_arms": {"x": {"like": "both", "contrast": {"scale": 9}}}, "grid": [{}, {"scale": 7}]},
            "x.contrast.scale: no arm may set it, as every arm takes it from compare.grid",
        ),
    ],
)
def test_unknown_arms_are_refused(make: Make, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_arms(make(**change).compare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_arms": {"x": {"like": "both", "contrast": {"stepz": 9}}}, "arms": ["both", "x"]}, "arm x: .*stepz"),
        ({"own_arms": {"x": {"like": "both", "first": {"sinkk": 9}}}, "arms": ["both", "x"]}, "arm x: .*sinkk"),
    ],
)
def test_an_arm_s_keys_are_read_before_anything_is_trained(
    make: Make, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        comparing.open_comparison(make(declared=[], **change), tmp_path)


def test_what_stands_twice_or_chooses_by_nothing_is_refused(make: Make, tmp_path: Path) -> None:
    for change in ({"seeds": [0, 0]}, {"arms": ["both", "both"]}, {"seeds_of": {"both": [1, 1]}}):
        with pytest.raises(InputError, match="stands there twice"):
            make(**change)
    with pytest.raises(InputError, match="seeds_of"):
        make(seeds_of={"both": []})
    recipe = make(grid=[{}, {"scale": 7}])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0})})
    with pytest.raises(InputError, match=r"data.held_out: 0 with a compare.grid"):
        comparing.open_comparison(recipe, tmp_path)


def test_without_a_grid_an_arm_s_own_keys_count(make: Make, tmp_path: Path) -> None:
    recipe = make(own_arms={"x": {"like": "both", "contrast": {"scale": 9}}}, arms=["both", "x"])
    x = find_arms(recipe.compare)[1]
    assert choices(recipe) == [{}]
    assert contrast_recipe(recipe, x, 0, choices(recipe)[0], None, 0, tmp_path).contrast.scale == 9


def test_a_choice_takes_from_the_recipe_what_it_leaves_out(make: Make) -> None:
    own = {"learning_rate": 1e-3, "warmup_steps": 2, "scale": 50.0}
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
    assert f"```\nanchorembed compare {path} --results {tmp_path / 'kept'}\n```" in text
    assert "seeds run: 0; planned: 0" in text

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


def test_every_arm_runs_and_spends_what_the_primary_one_does(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model FLOPs that trainings log; they run in this process, which saves starting 13 others."""

    def train_here(recipe: Recipe, place: Path, say: Callable[[str], None]) -> None:
        training.train(recipe, say)

    monkeypatch.setattr(comparing, "_train", train_here)
    recipe = make(arms=list(READY), declared=["contrast"])
    longer = recipe.reconstruct.model_copy(update={"steps": 24})
    comparison = comparing.open_comparison(recipe.model_copy(update={"reconstruct": longer}), tmp_path / "kept")
    assert comparing.run(comparison, lambda _: None) == 0
    costs = {line["arm"]: line["cost"] for line in comparison.results.lines}
    assert set(costs) == set(READY)
    assert not list((tmp_path / "run").glob("*/*/*/*/*/model"))
    budget, stage_two = costs["both"]["first"]["flops"], costs["contrast"]["contrast"]["flops"]
    for name, cost in costs.items():
        if name in ("base", "contrast"):
            assert "first" not in cost
            continue
        extra = cost["first"]["flops"] if "first" in cost else cost["contrast"]["flops"] - stage_two
        assert extra == pytest.approx(budget, rel=0.1), name
        if not READY[name].longer:
            assert cost["contrast"]["flops"] == stage_two, name  # the same pairs


def test_a_new_collection_is_run_alone_and_a_changed_one_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    evaluate = comparing.run_tasks

    def spy(adapter: TaskEmbedder, tasks: list[Task]) -> list[TaskScore]:
        asked.append([task.name for task in tasks])
        return evaluate(adapter, tasks)

    monkeypatch.setattr(comparing, "run_tasks", spy)
    arms = {"arms": ["base", "both"], "declared": []}
    names, kept = [str(tmp_path / f"{name}_test.jsonl") for name in "st"], tmp_path / "kept"
    shutil.copy(names[0], names[1])
    for tables in ({"Similar": names[:1]}, {"Similar": names}, {"Similar": names[1:]}, {"Similar": names}):
        comparison = comparing.open_comparison(make(collections=tables, **arms), kept)
        monkeypatch.setattr(type(comparison), "runs", lambda self: iter([comparing.Run(self.arms[0], 0, "own")]))
        comparing.run(comparison, lambda _: None)
    assert asked == [["s_test"], ["t_test"]]
    assert set(comparison.results.payload("base-" + comparison.arms[0].digest + "-own-0")["items"]) == {
        "s_test",
        "t_test",
    }
    with Path(names[0]).open("a", encoding="utf-8") as more:
        more.write('{"sentence1": "read", "sentence2": "write", "score": 2}\n')
    comparison = comparing.open_comparison(make(collections={"Similar": names}, **arms), kept)
    assert comparison.results.others == 1
    comparing.run(comparison, lambda _: None)
    assert asked[2:] == [["s_test"]]
    lines = (kept / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    (kept / "results.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.jsonl:4: this was run before"):
        comparing.open_comparison(make(collections={"Similar": names}, **arms), kept)


def test_a_collection_is_kept_as_soon_as_it_is_measured(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second, the first is kept with its items; what is run again is the second alone."""
    evaluate, asked = comparing.run_tasks, []

    def stopped(adapter: TaskEmbedder, tasks: list[Task]) -> list[TaskScore]:
        asked.append(tasks[0].name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(adapter, tasks)

    monkeypatch.setattr(comparing, "run_tasks", stopped)
    shutil.copy(tmp_path / "s_test.jsonl", tmp_path / "t_test.jsonl")
    names = [str(tmp_path / f"{name}_test.jsonl") for name in "st"]
    recipe = make(collections={"Similar": names}, arms=["base", "both"], declared=[], seeds=[0])
    comparison = comparing.open_comparison(recipe, tmp_path / "kept")
    monkeypatch.setattr(type(comparison), "runs", lambda self: iter([comparing.Run(self.arms[0], 0, "own")]))
    with pytest.raises(KeyboardInterrupt):
        comparing.run(comparison, lambda _: None)
    comparison = comparing.open_comparison(recipe, tmp_path / "kept")
    (run,) = comparison.runs()
    assert comparison.results.cells(run) == {"s_test"}
    first = comparison.results.payload(run.name)["items"]
    comparing.run(comparison, lambda _: None)
    assert asked == ["s_test", "t_test", "t_test"]
    assert comparison.results.payload(run.name)["items"] == {name: first["s_test"] for name in ("s_test", "t_test")}
    seconds = [line["cost"]["evaluate"]["seconds"] for line in comparison.results.of(run)]
    assert comparison.results.cost(run) == {"evaluate": {"seconds": pytest.approx(sum(seconds))}}


def test_instructions_are_for_any_task_of_the_comparison(make: Make, tmp_path: Path) -> None:
    comparing.open_comparison(make(instructions={"s_test": "x", "STS": "y"}), tmp_path)
    with pytest.raises(InputError, match=r"'s_tset' is no task here.* Did you mean 's_test'"):
        comparing.open_comparison(make(instructions={"s_tset": "x"}), tmp_path)


def test_nothing_is_chosen_until_all_of_the_grid_is_tried(make: Make, tmp_path: Path) -> None:
    """Of equals the first of the grid is chosen, as it is where it is trained."""
    comparison = comparing.open_comparison(make(grid=[{"scale": 7}, {"scale": 9}]), tmp_path)
    both = comparison.arms[2]
    line = {"kind": "grid", "arm": "both", "digest": both.digest, "seed": 0, "value": 0.5}
    line["cost"] = {"seconds": 1.0, "tokens": 1.0, "flops": 1.0, "peak_gb": 1.0}
    nine, seven = (f"learning_rate=0.001-warmup_steps=2-scale={scale}" for scale in (9, 7))
    for name, chosen in ((nine, False), (seven, True)):
        comparison.results.keep([line | {"choice": name}])
        gathering.report(comparison, "command")
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert f"{name}: 0.500".replace("_", "\\_") in text
        assert (f"chosen for Stage II: {seven};".replace("_", "\\_") in text) == chosen


def test_trials_with_another_seed_do_not_count(make: Make, tmp_path: Path) -> None:
    recipe = make(grid=[{"scale": 7}, {"scale": 9}])
    comparison = comparing.open_comparison(recipe, tmp_path)
    both = comparison.arms[2]
    for choice in choices(recipe):
        line = {"kind": "grid", "arm": "both", "digest": both.digest, "seed": 1, "value": 0.5}
        comparison.results.keep([line | {"choice": comparing.choice_name(choice)}])
    assert comparing.untried(comparison, both) == choices(recipe)


def test_a_model_of_another_number_of_steps_is_not_taken(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is that was trained before what matches compute was changed."""

    def train(recipe: Recipe, place: Path, say: Callable[[str], None]) -> None:
        (place / "reconstruct" / "model").mkdir(parents=True)
        (place / "reconstruct" / "model" / METADATA).write_text("{}", encoding="utf-8")
        (place / "reconstruct" / "log.jsonl").write_text('{"step": 6}\n', encoding="utf-8")

    monkeypatch.setattr(comparing, "_train", train)
    six, seven = (first_recipe(make(), READY["both"], 0, steps, tmp_path) for steps in (6, 7))
    assert comparing._trained(six, tmp_path, lambda _: None) == tmp_path / "reconstruct"
    with pytest.raises(InputError, match=r"its model has 6 steps, this comparison's 7. Remove the folder"):
        comparing._trained(seven, tmp_path, lambda _: None)


def test_models_are_deleted_once_no_run_needs_them(make: Make, tmp_path: Path) -> None:
    comparison = comparing.open_comparison(make(grid=[{"scale": 7}, {"scale": 9}], seeds=[0, 1]), tmp_path / "kept")
    (task,) = comparison.tasks["Similar"]
    contrast = comparison.arms[1]
    for setting, seed, left in (("own", 0, [0, 1]), ("common", 0, [1]), ("own", 1, [])):
        for model in ("first/reconstruct", "scale=7/contrast"):
            for number in [0, 1] if left == [0, 1] else []:
                (comparing._place(comparison, comparing.Run(contrast, number, "own")) / model / "model").mkdir(
                    parents=True
                )
        line = {
            "kind": "cell",
            "arm": "contrast",
            "digest": contrast.digest,
            "setting": setting,
            "seed": seed,
            "cost": {},
        }
        comparison.results.keep([line | {"collection": task.name, "metric": "Spearman", "value": 0.5}])
        comparing._delete_models(comparison, comparing.Run(contrast, seed, setting))
        assert sorted({path.parts[-4] for path in (tmp_path / "run").glob("*/*/*/*/*/model")}) == [
            f"seed-{number}" for number in left
        ]


def test_the_plan_says_hours_by_what_like_runs_took(make: Make, tmp_path: Path) -> None:
    """One run of an hour and two trials of half an hour are done; five runs and two trials are to come."""
    comparison = comparing.open_comparison(make(seeds=[0, 1], grid=[{"scale": 7}, {"scale": 9}]), tmp_path)
    assert "hours to go" not in comparing.plan(comparison)
    both, (task,) = comparison.arms[2], comparison.tasks["Similar"]
    line = {"arm": "both", "digest": both.digest, "seed": 0}
    for choice in choices(comparison.recipe):
        trial = {"kind": "grid", "choice": comparing.choice_name(choice), "value": 0.5, "cost": {"seconds": 1800.0}}
        comparison.results.keep([line | trial])
    cost = {"first": {"seconds": 3000.0}, "contrast": {"seconds": 500.0}, "evaluate": {"seconds": 100.0}}
    cell = {"kind": "cell", "setting": "own", "collection": task.name, "metric": "Spearman", "value": 0.5}
    comparison.results.keep([line | cell | {"cost": cost}])
    assert "about 6.0 hours to go" in comparing.plan(comparison)
    common = line | cell | {"arm": "contrast", "digest": comparison.arms[1].digest, "setting": "common", "cost": {}}
    comparison.results.keep([common])
    assert "about 5.0 hours to go" in comparing.plan(comparison)


def test_what_the_budget_follows_from_is_part_of_the_comparison(make: Make, tmp_path: Path) -> None:
    def key(rate: float, title: str = "", **compare: object) -> str:
        own = {"mine": {"like": "both", "title": title, "first": {"learning_rate": rate}}}
        arms = ["base", "contrast", "both", "mine"]
        return comparing.open_comparison(make(arms=arms, own_arms=own, **compare), tmp_path).results.key

    assert key(1e-3) == key(1e-4)
    assert key(1e-3, primary="mine") != key(1e-4, primary="mine")
    assert key(1e-3, primary="mine") == key(1e-3, title="Other words", primary="mine")
    assert key(1e-3) == key(1e-3, seeds=[0, 1])
    assert key(1e-3) != key(1e-3, seeds=[1, 0])


def test_a_comparison_or_training_at_work_is_left_alone(make: Make, tmp_path: Path) -> None:
    comparison = comparing.open_comparison(make(), tmp_path / "kept")
    with alone_in(tmp_path / "kept"), pytest.raises(InputError, match="another process is at work there"):
        comparing.run(comparison, lambda _: None)
    recipe = make().model_copy(update={"compare": None})
    with alone_in(tmp_path / "run" / "reconstruct"), pytest.raises(InputError, match="another process is at work"):
        training.train(recipe)


def test_scores_of_items_of_other_data_are_not_taken(make: Make, tmp_path: Path) -> None:
    comparison = comparing.open_comparison(make(), tmp_path)
    run, (task,) = comparing.Run(comparison.arms[0], 0, "own"), comparison.tasks["Similar"]
    name, revision = task.name, task.revision
    line = {"kind": "cell", "arm": "base", "digest": run.arm.digest, "setting": "own", "seed": 0, "cost": {}}
    line |= {"collection": name, "metric": "Spearman", "value": 0.5}
    for number, known in enumerate((revision, "other")):
        payload = {"items": {name: {"0": 0.4, "1": 0.6}}, "revisions": {name: known}}
        comparison.results.keep([line] if number == 0 else [], run.name, payload)
        gathering.report(comparison, "command")
        assert ("0.500 \\[" in (tmp_path / "report.md").read_text(encoding="utf-8")) == (known == revision)


@pytest.mark.parametrize("damaged", [b'{"cut sho', b'{"key": "\xff"}'])
def test_damaged_results_are_named(make: Make, tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "x"}\n' + damaged)
    with pytest.raises(InputError, match=r"results\.jsonl:2: damaged"):
        comparing.open_comparison(make(), tmp_path)


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"x" + packed, lambda _: b""])
def test_damaged_scores_of_items_are_named(make: Make, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    comparison = comparing.open_comparison(make(), tmp_path)
    run = comparing.Run(comparison.arms[0], 0, "own")
    comparison.results.keep([], run.name, {"items": {}})
    (path,) = (tmp_path / "results").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{path.name}: damaged"):
        gathering.report(comparison, "command")


@pytest.mark.parametrize(
    ("key", "same"),
    [("evaluate_every", True), ("tokens_per_micro_batch", True), ("steps", False), ("bag_weight", False)],
)
def test_what_only_costs_makes_no_other_comparison(make: Make, tmp_path: Path, key: str, same: bool) -> None:
    recipe = make()
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={key: 1})})
    found = [comparing.open_comparison(one, tmp_path).results.key for one in (recipe, changed)]
    assert (found[0] == found[1]) is same


def test_keys_that_came_later_leave_older_results_theirs() -> None:
    """At their defaults they are in no plan and no key, and what is only reported is in none."""
    assert {"bag_weight", "decode"} <= Reconstruct().cost_only
    assert not {"bag_weight", "decode"} & Reconstruct(bag_weight=1.0, decode=False).cost_only


def test_what_is_only_reported_makes_no_other_comparison(make: Make, tmp_path: Path) -> None:
    explored = make(explore={"contrast": ["base"]})
    found = [comparing.open_comparison(one, tmp_path).results.key for one in (make(), explored)]
    assert found[0] == found[1]


def test_evaluations_that_choose_a_model_decide(make: Make, tmp_path: Path) -> None:
    own = {"best": {"like": "both", "first": {"keep_best": True}}}
    recipe = make(arms=["base", "contrast", "both", "best"], own_arms=own)
    changed = recipe.model_copy(update={"reconstruct": recipe.reconstruct.model_copy(update={"evaluate_every": 1})})
    first, second = (comparing.open_comparison(one, tmp_path).results.key for one in (recipe, changed))
    assert first != second


def test_a_model_folder_is_what_it_holds(make: Make, tmp_path: Path) -> None:
    recipe = make()
    there = shutil.copytree(recipe.model.name, tmp_path / "m")
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(there)})})
    first, second = (comparing.open_comparison(one, tmp_path).results.key for one in (recipe, moved))
    assert first == second


def test_a_model_folder_with_other_weights_is_another_comparison(make: Make, tmp_path: Path) -> None:
    recipe = make()
    folder = shutil.copytree(recipe.model.name, tmp_path / "model")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})})
    before = comparing.open_comparison(recipe, tmp_path).results.key
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert comparing.open_comparison(recipe, tmp_path).results.key != before


def test_a_signal_to_compare_alone_stops_its_training_too(make: Make, tmp_path: Path) -> None:
    """The training writes a checkpoint and ends, and what is run again goes on from there."""
    number = signal.SIGHUP
    recipe = make(arms=["both"], declared=[])
    slow = recipe.reconstruct.model_copy(update={"steps": 100_000, "evaluate_every": 0})
    recipe = recipe.model_copy(update={"reconstruct": slow})
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    command = [sys.executable, "-m", "anchorembed", "compare", str(path)]
    before = signal.signal(number, lambda *_: None)  # one that is ignored here, as under nohup, is so in a child, too
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        signal.signal(number, before)
        deadline = time.monotonic() + 120
        logs = "run/*/*/*/first/reconstruct/log.jsonl"
        while not any(log.stat().st_size for log in tmp_path.glob(logs)) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its training, too
    assert process.returncode == 128 + number, error
    assert "Stopped. To continue: anchorembed compare" in error
    (stage,) = tmp_path.glob("run/*/*/*/first/reconstruct")
    assert list(stage.glob("checkpoints/step-*"))
    with alone_in(stage):
        pass  # nobody is at work there any more


def test_signals_that_ask_to_stop_are_heard_and_told_once() -> None:
    """But for those that are ignored, as under nohup; the training is sent SIGTERM, and its exit code is waited for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
    try:
        with (
            comparing._signals() as heard,
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process,
        ):
            process.stdout.readline()  # it is ready
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert heard == [signal.SIGTERM, signal.SIGINT]
            assert comparing._wait(process, heard) == 7
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, interrupted)


@pytest.mark.parametrize("code", [143, -signal.SIGTERM])
def test_a_stopped_training_is_no_fault(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whether the training could still write a checkpoint or was not ready for signals yet."""
    monkeypatch.setattr(comparing, "_wait", lambda process, _: (process.kill(), code)[1])
    with pytest.raises(Interrupted) as caught:
        comparing.run(comparing.open_comparison(make(arms=["both"], declared=[]), tmp_path), lambda _: None)
    assert caught.value.signal == signal.SIGTERM


def test_a_training_that_is_killed_is_said(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_wait", lambda process, _: (process.kill(), -signal.SIGKILL)[1])
    with pytest.raises(
        InputError, match=r"recipe\.yaml: training it was killed, .*memory.* Lower the stage's tokens_per_micro_batch"
    ):
        comparing.run(comparing.open_comparison(make(arms=["both"], declared=[]), tmp_path), lambda _: None)


def test_paths_may_name_variables(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make().model_dump(mode="json", by_alias=True)
    values["data"]["sources"][0]["path"] = "$ANCHOREMBED_DATA/pairs.jsonl"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setenv("ANCHOREMBED_DATA", str(tmp_path))
    assert read_recipe(tmp_path / "r.yaml").data.sources[0].path == tmp_path / "pairs.jsonl"
    gathering.report(comparing.open_comparison(read_recipe(tmp_path / "r.yaml"), tmp_path / "kept"), "command")
    assert "path: $ANCHOREMBED_DATA/pairs.jsonl" in (tmp_path / "kept" / "report.md").read_text(encoding="utf-8")
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
