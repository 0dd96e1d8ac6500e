"""Finished results are kept and never computed twice, and all are in the report."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from anchorembed.cli.main import app
from anchorembed.compare import run as run_module
from anchorembed.compare import training
from anchorembed.compare.arms import READY_ARMS
from anchorembed.compare.controls import train_arm
from anchorembed.compare.plan import describe, open_comparison
from anchorembed.compare.records import COMMON, OWN, Cell, ComparisonRecord, Run
from anchorembed.compare.run import run
from anchorembed.errors import InputError
from anchorembed.evaluate.tasks import Task, TaskEmbedder, TaskScore
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import TokenPair
from anchorembed.model.truncate_and_quantize import VectorFormat
from anchorembed.recipe_schema import Recipe
from anchorembed.system.files import lock_folder
from anchorembed.train.prepare import Prepared, prepare
from anchorembed.train.run import train

Make = Callable[..., Recipe]


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings need no process of their own here, which takes seconds to start; `test_training` starts some."""
    monkeypatch.setattr(training, "_train", train_arm)


def base_alone(record: ComparisonRecord) -> Iterator[Run]:
    yield record.arms[0].run(OWN, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
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
    opened = open_comparison(recipe, tmp_path / "kept")
    costs = opened.results.record(opened.arm_record("both").run(OWN, 0)).costs
    assert costs["before"].flops > costs["contrast"].flops > 0
    assert all(costs[stage].seconds > 0 for stage in ("before", "contrast", "evaluate"))
    assert opened.results.record(opened.arm_record("contrast").run(COMMON, 0)).curves
    page, text = ((tmp_path / "kept" / name).read_text("utf-8") for name in ("report.html", "report.md"))
    for words in ("Both + contrastive", "Contrastive only", "s_test", "Exploratory", "gain"):
        assert words in page, words
    assert f"{both['value']:.3f}" in text
    assert f"```\nanchorembed compare {path} --results {tmp_path / 'kept'}\n```" in text
    assert "seeds run: 0; planned: 0" in text

    shutil.rmtree(tmp_path / "run")  # as on another machine, which has the results only
    capfd.readouterr()
    app(command, standalone_mode=False)
    assert "4 runs, 4 of them done" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    again = [json.loads(line) for line in (tmp_path / "kept" / "results.jsonl").read_text("utf-8").splitlines()]
    assert again == lines

    changed = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update={"steps": 5})})
    other = open_comparison(changed, tmp_path / "kept")
    assert len(other.missing()) == 4
    assert "are of other settings" in describe(other)

    copy = shutil.copytree(tmp_path / "kept", tmp_path / "elsewhere" / "copy")
    for name in ("pairs.jsonl", "s_test.jsonl"):  # the report needs the results folder alone
        (tmp_path / name).unlink()
    for arguments in (["--results", str(copy)], [str(path), "--results", str(copy)]):
        for name in ("report.html", "report.md"):
            (copy / name).unlink()
        app(["compare", "--report", *arguments], standalone_mode=False)
        assert [(copy / name).read_text("utf-8") for name in ("report.html", "report.md")] == [page, text]


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_every_arm_runs_with_the_compute_of_the_primary_arm(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the model FLOPs that trainings log."""
    recipe = make(arms=list(READY_ARMS), declared=["contrast"])
    longer = recipe.reconstruct.model_copy(update={"steps": 24})
    comparison = open_comparison(recipe.model_copy(update={"reconstruct": longer}), tmp_path / "kept")
    with caplog.at_level("INFO", "anchorembed.compare"):
        assert run(comparison) == 0
    assert f"Base model, seed 0, own settings: run 1 of {len(READY_ARMS)}" in caplog.messages
    costs = {run.arm: comparison.results.record(run).costs for run in comparison.record.runs()}
    assert set(costs) == set(READY_ARMS)
    assert not list((tmp_path / "run").glob("*/*/*/*/*/model"))
    budget, stage_two = costs["both"]["before"].flops, costs["contrast"]["contrast"].flops
    for name, cost in costs.items():
        if name in ("base", "contrast"):
            assert "before" not in cost
            continue
        extra = cost["before"].flops if "before" in cost else cost["contrast"].flops - stage_two
        assert extra == pytest.approx(budget, rel=0.1), name
        if not READY_ARMS[name].longer:
            assert cost["contrast"].flops == stage_two, name  # the same pairs


def test_a_new_collection_is_run_alone_and_a_changed_one_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    evaluate = run_module.run_tasks

    def spy(embedder: TaskEmbedder, tasks: list[Task]) -> list[TaskScore]:
        asked.append([task.name for task in tasks])
        return evaluate(embedder, tasks)

    monkeypatch.setattr(run_module, "run_tasks", spy)
    arms = {"arms": ["base", "both"], "declared": []}
    names, kept = [str(tmp_path / f"{name}_test.jsonl") for name in "st"], tmp_path / "kept"
    shutil.copy(names[0], names[1])
    for tables in ({"Similar": names[:1]}, {"Similar": names}, {"Similar": names[1:]}, {"Similar": names}):
        comparison = open_comparison(make(collections=tables, **arms), kept)
        monkeypatch.setattr(ComparisonRecord, "runs", base_alone)
        run(comparison)
    assert asked == [["s_test"], ["t_test"]]
    (base,) = comparison.record.runs()
    assert set(comparison.results.record(base).items) == {"s_test", "t_test"}
    with Path(names[0]).open("a", encoding="utf-8") as more:
        more.write('{"sentence1": "read", "sentence2": "write", "score": 2}\n')
    comparison = open_comparison(make(collections={"Similar": names}, **arms), kept)
    assert comparison.results.ignored_lines == 1
    run(comparison)
    assert asked[2:] == [["s_test"]]
    lines = (kept / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    (kept / "results.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"results\.jsonl:4: an earlier line has the same result"):
        open_comparison(make(collections={"Similar": names}, **arms), kept)


def test_a_collection_is_written_as_soon_as_it_is_evaluated(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second, the first is kept with its items; what is run again is the second alone.

    Items are kept with six significant digits, but those of an earlier file as they are.
    """
    evaluate, asked, exact = run_module.run_tasks, [], {}

    def stopped(embedder: TaskEmbedder, tasks: list[Task]) -> list[TaskScore]:
        asked.append(tasks[0].name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        (score,) = evaluate(embedder, tasks)
        exact[score.task] = score.items
        return [score]

    monkeypatch.setattr(run_module, "run_tasks", stopped)
    shutil.copy(tmp_path / "s_test.jsonl", tmp_path / "t_test.jsonl")
    names = [str(tmp_path / f"{name}_test.jsonl") for name in "st"]
    recipe = make(collections={"Similar": names}, arms=["base", "both"], declared=[], seeds=[0])
    comparison = open_comparison(recipe, tmp_path / "kept")
    monkeypatch.setattr(ComparisonRecord, "runs", base_alone)
    with pytest.raises(KeyboardInterrupt):
        run(comparison)
    comparison = open_comparison(recipe, tmp_path / "kept")
    (base,) = comparison.record.runs()
    assert [cell.collection for cell in comparison.results.cells_of(base)] == ["s_test"]
    stopped_record = comparison.results.record(base)
    rounded = {item: float(f"{score:.6g}") for item, score in exact["s_test"].items()}
    assert stopped_record.items["s_test"].scores == rounded != exact["s_test"]
    earlier = replace(stopped_record.items["s_test"], scores=exact["s_test"])
    comparison.results.write_record(base, replace(stopped_record, items={"s_test": earlier}))
    run(comparison)
    assert asked == ["s_test", "t_test", "t_test"]
    record = comparison.results.record(base)
    assert record.items == {"s_test": earlier, "t_test": stopped_record.items["s_test"]}
    assert record.costs["evaluate"].seconds > stopped_record.costs["evaluate"].seconds > 0


def test_models_are_deleted_once_no_run_needs_them(make: Make, tmp_path: Path) -> None:
    comparison = open_comparison(make(grid=[{"scale": 7}, {"scale": 9}], seeds=[0, 1]), tmp_path / "kept")
    (task,) = comparison.tasks
    contrast = comparison.arm_record("contrast")
    for setting, seed, left in (("own", 0, [0, 1]), ("common", 0, [1]), ("own", 1, [])):
        for model in ("before/reconstruct", "scale=7/contrast"):
            for number in [0, 1] if left == [0, 1] else []:
                (training.run_folder(comparison, contrast.run(OWN, number)) / model / "model").mkdir(parents=True)
        done = contrast.run(setting, seed)
        comparison.results.append(
            Cell(**asdict(done), choice="", collection=task.name, revision=task.revision, metric="Spearman", value=0.5)
        )
        run_module._delete_models(comparison, done)
        assert sorted({path.parts[-4] for path in (tmp_path / "run").glob("*/*/*/*/*/model")}) == [
            f"seed-{number}" for number in left
        ]


def test_a_locked_folder_of_results_or_of_a_stage_is_refused(make: Make, tmp_path: Path) -> None:
    comparison = open_comparison(make(), tmp_path / "kept")
    with lock_folder(tmp_path / "kept"), pytest.raises(InputError, match="another process is at work there"):
        run(comparison)
    recipe = make().model_copy(update={"compare": None})
    with lock_folder(tmp_path / "run" / "reconstruct"), pytest.raises(InputError, match="another process is at work"):
        train(recipe)


def test_an_undefined_score_cannot_be_compared(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = open_comparison(make(), tmp_path / "kept")
    wanted = comparison.arm_record("base").run(OWN, 0)
    (task,) = comparison.tasks
    score = TaskScore(task.name, task.kind, "Spearman", math.nan, {}, {}, VectorFormat(32))
    monkeypatch.setattr(run_module, "run_tasks", lambda *_: [score])
    embedder = Embedder.load(comparison.recipe.model.name)
    with pytest.raises(
        InputError, match=rf"{task.name}: Spearman of .* is undefined, so arms cannot be compared by it"
    ):
        list(run_module._evaluate(comparison, wanted, embedder))


def test_isotropy_is_of_pairs_from_all_held_out_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, tokens, asked = make(), Prepared.tokens, []

    def spy(prepared: Prepared, indices: list[int]) -> list[TokenPair]:
        asked.append(indices)
        return tokens(prepared, indices)

    monkeypatch.setattr(Prepared, "tokens", spy)
    monkeypatch.setattr(run_module, "_ISOTROPY_PAIRS", 4)
    prepared = prepare(recipe, recipe.model.name)
    run_module._isotropy(prepared, prepared.embedder)
    assert asked == [prepared.split.held_out[::2].tolist()]
