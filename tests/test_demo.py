"""The demo on a tiny model and a few made packages: every row, and a second run that reuses everything."""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anchorembed import demo as module
from anchorembed.curate.docstrings import Package
from anchorembed.curate.harvest import Harvest, harvest_packages
from anchorembed.data.beir import read_collection
from anchorembed.demo import CLEARLY, SIZES, DemoResult, ModelScores, demo, page_of, show, size
from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import METRICS
from anchorembed.page.html import html
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.clock import Clock
from anchorembed.train.time_budget import ENOUGH, StageTimes, Times
from tiny import WORDS

pytestmark = pytest.mark.slow  # they share one demo


def package(root: Path, number: int) -> Package:
    folder = root / f"package{number}"
    folder.mkdir(parents=True)
    functions = [
        f'def f{i}():\n    """{WORDS[i].title()} the {WORDS[-i]} {number}.\n\n'
        f'    The {WORDS[i]} {number} {" ".join(WORDS[j] for j in range(i))} of it is done at once.\n    """\n'
        for i in range(1, 9)
    ]
    (folder / "__init__.py").write_text("\n".join(functions), encoding="utf-8")
    return Package(f"package{number}", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANCHOREMBED_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Harvest:
    packages = [package(folder / "site", number) for number in range(12)]
    return harvest_packages(folder / "data", lambda: packages, "first", held_out_share=0.2, largest_overlap=0.99)


@pytest.fixture(scope="module")
def recipe(made: Harvest, folder: Path, tiny_folder: Path) -> Recipe:
    stage: dict[str, Any] = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    return parse_recipe(
        {
            "data": {"sources": [{"name": "d", "path": str(made.train)}], "query_tokens": 24, "document_tokens": 48},
            "model": {"name": str(tiny_folder), "device": "cpu"},
            "reconstruct": stage,
            "contrast": stage,
            "output": str(folder / "run"),
        }
    )


@pytest.fixture(scope="module")
def result(made: Harvest, recipe: Recipe) -> DemoResult:
    return demo(recipe, made)


def test_every_row(result: DemoResult) -> None:
    assert list(result.rows) == ["chance", "base model", "contrastive only", "Stage I + contrastive"]
    weights = [row.weights_sha256 for row in result.rows.values()]
    assert weights[0] == ""
    assert len(set(weights)) == 4
    assert all(0 <= value <= 1 for row in result.rows.values() for value in row.means.values())
    assert [len(hits) for _, hits in result.searches] == [3, 3, 3]
    assert (result.exported / "modules.json").exists()


def test_a_second_run_reuses_everything(
    result: DemoResult, made: Harvest, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "anchorembed")
    repeated = demo(recipe, made)
    assert repeated.rows == result.rows
    assert sum("finished before" in message for message in caplog.messages) == 3
    assert sum("reused" in message for message in caplog.messages) == 3
    assert any("export: kept" in message for message in caplog.messages)

    (recipe.output / "evaluation" / "contrastive-only.json").write_text('{"key": ', encoding="utf-8")
    caplog.clear()
    assert demo(recipe, made).rows == result.rows, "a damaged file of scores is made anew"
    assert sum("reused" in message for message in caplog.messages) == 2
    (document, *_), scores = made.collection.glob("corpus.jsonl"), recipe.output / "evaluation" / "base-model.json"
    document.write_text(document.read_text(encoding="utf-8").replace("at once", "later"), encoding="utf-8")
    saved = json.loads((result.exported / "anchorembed.json").read_text(encoding="utf-8"))
    (result.exported / "anchorembed.json").write_text(json.dumps(saved | {"weights_sha256": "other"}), encoding="utf-8")
    before = json.loads(scores.read_text(encoding="utf-8"))["key"]
    caplog.clear()
    demo(recipe, made)
    assert json.loads(scores.read_text(encoding="utf-8"))["key"] != before, "texts changed, their ids did not"
    assert not any("export: kept" in message for message in caplog.messages)


def test_what_the_demo_cannot_show_or_replace_is_refused(
    made: Harvest, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "harvest", lambda output: pytest.fail("it takes time, and is for nothing"))
    lacking = recipe.model_copy(update={"reconstruct": None, "output": tmp_path / "run"})
    for begin in (lambda: demo(lacking, made), lambda: module.run(lacking, 10)):
        with pytest.raises(InputError, match="reconstruct is null, and the demo shows both stages"):
            begin()
    assert recipe.contrast is not None
    elsewhere = recipe.contrast.model_copy(update={"from_": recipe.model.name})
    with pytest.raises(InputError, match="Stage II of the demo starts from Stage I"):
        demo(recipe.model_copy(update={"contrast": elsewhere, "output": tmp_path / "run"}), made)
    mine = tmp_path / "run" / "export" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept", encoding="utf-8")
    with pytest.raises(InputError, match="this is no export of ours"):
        demo(recipe.model_copy(update={"output": tmp_path / "run"}), made)
    assert mine.exists()
    assert not (tmp_path / "run" / "contrastive-only").exists()


def test_the_last_screen_shows_brackets_as_they_are(made: Harvest) -> None:
    empty = DemoResult(
        read_collection(made.collection), {}, [("Join [/tmp] and list[int] :100:", [])], Path("[/a]"), Path("b"), {}
    )
    means = dict.fromkeys(METRICS, 0.5)
    names = ("chance", "contrastive only", "Stage I + contrastive")
    sink = io.StringIO()
    show(replace(empty, rows={name: ModelScores(means) for name in names}), Console(file=sink, width=160))
    assert "Join [/tmp] and list[int] :100:" in sink.getvalue()
    assert "exported model: [/a]" in sink.getvalue()


def test_the_last_screen_says_when_nothing_is_clearly_above_chance(result: DemoResult) -> None:
    sink = io.StringIO()
    show(result, Console(file=sink, width=160))
    screen = sink.getvalue()
    for expected in ("chance", "Stage I + contrastive", "nDCG@10", str(result.exported), str(result.run)):
        assert expected in screen
    best = max(result.rows[name].means["nDCG@10"] for name in ("contrastive only", "Stage I + contrastive"))
    sink = io.StringIO()
    poor = result.rows["chance"]
    rows = result.rows | {"contrastive only": poor, "Stage I + contrastive": poor}
    shown = replace(result, rows=rows, longer=27, minutes=10.2, page=result.run / "page.html")
    show(shown, Console(file=sink, width=80))
    assert f"Train longer, with --minutes 27 --set output={result.run}-longer" in sink.getvalue()
    last = sink.getvalue().splitlines()[-1]
    assert last == f"page to look at: {(result.run / 'page.html').resolve().as_uri()}"
    assert ("recipes/docstrings.yaml" in screen) == (best < CLEARLY * result.rows["chance"].means["nDCG@10"])


def measured(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Have every step take so many seconds; returns what is measured, as it is."""
    calls: list[str] = []

    def times(recipe: Recipe, texts: list[str], embeddings: int, loads: int) -> tuple[Times, int]:
        calls.append(str(recipe.data.sources[0].path))
        stage = StageTimes(seconds, 4 * seconds, seconds)
        return Times(stage, stage, embeddings * seconds / 100, 10 * seconds), 16_000

    monkeypatch.setattr(module, "measure", times)
    return calls


def sized(recipe: Recipe, made: Harvest, folder: Path) -> Clock:
    """The clock of a demo of 10 minutes."""
    clock = size(recipe.model_copy(update={"output": folder}), made, 10, time.monotonic())
    assert clock is not None
    return clock


def test_a_demo_is_sized_once(
    made: Harvest, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Begun again, by a machine that is slower now, it has the sizes it was begun with."""
    begun = recipe.model_copy(update={"output": tmp_path})
    calls = measured(monkeypatch, 5.0)
    clock = sized(recipe, made, tmp_path)
    assert calls == [str(made.train)]
    assert said[-1].startswith("sizes: an estimate by the time of the first steps: about 10 minutes (asked: 10): ")
    calls = measured(monkeypatch, 50.0)
    assert sized(recipe, made, tmp_path).sizing == clock.sizing
    assert calls == []
    assert said[-1].startswith("sizes: as this demo was begun: about 10 minutes")
    with pytest.raises(InputError, match="was begun with --minutes 10, not 0"):
        size(begun, made, 0, 0.0)
    (tmp_path / "unsized" / "contrastive-only").mkdir(parents=True)
    with pytest.raises(InputError, match="was begun with --minutes 0, not 10"):
        sized(recipe, made, tmp_path / "unsized")
    assert not (tmp_path / "unsized" / SIZES).exists(), "it can go on with the recipe's steps"
    assert json.loads((tmp_path / SIZES).read_text(encoding="utf-8"))["asked"] == 10
    (tmp_path / SIZES).write_text('{"asked": 10, "sizes": {"minutes": 3}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"sizes.json: damaged, or of another version .* Delete its folder"):
        size(begun, made, 10, 0.0)


def test_what_the_first_arm_took_decides_stage_one(
    made: Harvest, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Steps of half the time leave time for more of Stage I; that is kept, and Stage II is not changed."""
    measured(monkeypatch, 5.0)
    clock = sized(recipe, made, tmp_path)
    planned = clock.sizing.sizes
    log = tmp_path / "log.jsonl"
    seconds = [2.5] * (planned.contrast_steps - 1) + [12.5]  # the last with evaluations that were to take 20
    log.write_text("".join(f'{{"step": {n}, "seconds": {s}}}\n' for n, s in enumerate(seconds)), encoding="utf-8")
    sizes = clock.arm_done(1, log)
    assert sizes.contrast_steps == planned.contrast_steps
    assert sizes.reconstruct_steps > 2 * planned.reconstruct_steps
    assert said[-1].startswith(f"sizes: 10.0 minutes are left: {sizes.reconstruct_steps} steps of Stage I; about 10")
    assert sized(recipe, made, tmp_path).arm_done(1, tmp_path / "none.jsonl") == sizes
    assert clock.arm_done(2, log).documents == 500


def test_a_slow_machine_is_told_before_it_trains(
    made: Harvest, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    measured(monkeypatch, 40.0)
    clock = sized(recipe, made, tmp_path)
    assert f"--minutes {clock.sizing.minutes_for(ENOUGH)} would be, on this machine" in said[-1]
    assert clock.sizing.minutes_for(2 * ENOUGH) > clock.sizing.minutes_for(ENOUGH) > 10
    assert size(recipe.model_copy(update={"output": tmp_path / "other"}), made, 0, 0.0) is None
    assert not (tmp_path / "other").exists()


def test_a_whole_demo_says_a_line_a_stage(
    made: Harvest,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No terminal: no bars, and no lines of other libraries; both arms have the same Stage II."""
    measured(monkeypatch, 2000.0)
    monkeypatch.setattr(module, "harvest", lambda output: made)
    result = module.run(recipe.model_copy(update={"output": tmp_path / "run"}), 0.01)
    stages = [line for line in said if ": reconstruct: " in line or ": contrast: " in line]
    names, steps = zip(*(line.split(" steps")[0].rsplit(" ", 1) for line in stages), strict=True)
    assert names == (
        "contrastive only: contrast:",
        "Stage I + contrastive: reconstruct:",
        "Stage I + contrastive: contrast:",
    )
    assert steps[0] == steps[2] == "4"
    assert [line.split(":")[0] for line in said if line not in stages] == [
        *["sizes"] * 4,
        *["evaluation"] * 3,
        "export",
        next(line for line in said if line.startswith("the export cuts queries and documents at 48 tokens")),
        *["export"] * 4,
    ]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert result.longer is not None
    assert result.page == tmp_path / "run" / "page.html"


def test_the_page_shows_the_four_models(result: DemoResult) -> None:
    page = page_of(result)
    assert list(page.maps) == ["base model", "contrastive only", "Stage I", "Stage I + contrastive"]
    assert page.rows == {name: row.means for name, row in result.rows.items()}
    assert set(page.charts[0].curves) == {"contrastive only", "Stage I + contrastive"}
    assert "that were not trained on" in html(page)
