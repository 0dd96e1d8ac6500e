"""The report has the numbers of its cells, escapes all text, and says what is missing; a browser shows it."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from anchorembed.compare import figures
from anchorembed.compare.analysis import analyse
from anchorembed.compare.records import ArmRecord, Cell, ComparisonRecord, Cost, ItemScores, Run, RunRecord
from anchorembed.compare.report import build_report, by_compute, html, markdown, write_report
from anchorembed.compare.results import Evidence, Results, write_comparison
from anchorembed.evaluate.isotropy import Isotropy
from anchorembed.evaluate.statistics import holm, sign_flip_p
from balanced import Balanced

Items = dict[str, float]

EVIL = '<b>&"'


def items(seed: int, shift: float) -> dict[str, float]:
    return {f"q{number}": float(value) + shift for number, value in enumerate(np.random.default_rng(seed).random(40))}


def scores(arm: str, seed: int, collection: str, shift: float, setting: str = "own") -> tuple[Cell, Items]:
    values = items(seed, shift)
    return valued(arm, seed, collection, sum(values.values()) / len(values), setting), values


def valued(arm: str, seed: int, collection: str, value: float, setting: str = "own", metric: str = "nDCG@10") -> Cell:
    return Cell(arm, "0", setting, seed, "", collection, "r", metric, value)


def arm_record(name: str, title: str, what: str, settings: dict[str, str]) -> ArmRecord:
    return ArmRecord(name, title, what, "0", True, False, [0, 1], 0, settings)


def with_cells(evidence: Evidence, measured: list[tuple[Cell, Items]]) -> Evidence:
    """The evidence with other cells; costs, curves and isotropy stay those of their runs."""
    runs = {run: replace(record, items={}) for run, record in evidence.runs.items()}
    for cell, values in measured:
        record = runs.get(cell.run, RunRecord())
        runs[cell.run] = replace(record, items=record.items | {cell.collection: ItemScores("r", values)})
    return replace(evidence, cells=[cell for cell, _ in measured], runs=runs)


def kept(evidence: Evidence, keep: Callable[[Cell], bool]) -> list[tuple[Cell, Items]]:
    """Cells of the evidence to keep, with their items."""
    return [(cell, evidence.runs[cell.run].item_scores(cell)) for cell in evidence.cells if keep(cell)]


@pytest.fixture
def evidence() -> Evidence:
    """``both`` is 0.2 above ``plain`` on ``one`` with two seeds each, equal on ``two``; ``evil`` ran once."""
    measured = [scores("plain", seed, name, 0.0) for name in ("one", "two") for seed in (0, 1)]
    measured += [scores("both", seed, name, shift) for name, shift in (("one", 0.2), ("two", 0.0)) for seed in (0, 1)]
    measured += [scores("evil", 0, "one", -0.1), scores("plain", 0, "one", 0.05, "common")]
    measured += [(valued(arm, 0, "pairs", value, metric="AP"), {}) for arm, value in (("plain", 0.5), ("both", 0.75))]
    comparison = ComparisonRecord(
        key="k",
        title=f"Made {EVIL}",
        recipe=f"seed: 0  # {EVIL}",
        command="anchorembed compare x.yaml",
        arms=[
            arm_record("plain", "Plain", "Nothing before.", {"steps": "3"}),
            arm_record("both", "Both", "Stage I before.", {}),
            arm_record("evil", EVIL, "Escaped.", {}),
        ],
        primary="both",
        declared=["plain", "evil"],
        explore={"plain": ["evil"]},
        choices=["scale=20", "scale=50"],
        notes=["A note."],
        tables={"Zero-shot": {"one": "r", "two": "r"}, "Other": {"pairs": "r"}},
    )
    record = RunRecord(
        costs={"before": Cost(90.0, 1000, 2e15, 1.5), "evaluate": Cost(30.0)},
        curves={
            "before": [{"step": 1, "loss_q2d": 3.0}, {"step": 2, "loss_q2d": 2.0}],
            "contrast": [{"step": 5, "held_out_accuracy": 0.25}, {"step": 10, "held_out_accuracy": 0.5}],
        },
        isotropy={"base": Isotropy(mean_cosine=0.9, effective_rank=2.5, alignment=0.1, uniformity=-0.3)},
        made_with={"torch": "1", "threads": "2"},
    )
    return with_cells(Evidence(comparison, [], [], {Run("both", "0", "own", 0): record}), measured)


def written(evidence: Evidence, folder: Path) -> list[Path]:
    """Reports of the evidence, by way of a results folder."""
    results = Results(folder, evidence.comparison.key, evidence.comparison.revisions)
    for run, record in evidence.runs.items():
        results.write_record(run, record)
    results.append(*evidence.cells)
    write_comparison(folder, evidence.comparison)
    return write_report(folder)


def test_numbers_are_those_of_the_cells(evidence: Evidence) -> None:
    analysis = analyse(evidence)
    both, plain = (analysis.scores[arm, "own", "one"] for arm in ("both", "plain"))
    assert both.mean == pytest.approx(plain.mean + 0.2)
    assert both.by_seed == {c.seed: c.value for c in evidence.cells if c.arm == "both" and c.collection == "one"}
    assert both.interval is not None
    assert both.interval[0] < both.mean < both.interval[1]
    assert analysis.scores["plain", "own", "pairs"].interval is None
    found = {(test.against, test.collection): test for test in analysis.declared}
    assert set(found) == {("plain", "one"), ("plain", "two"), ("evil", "one")}
    averaged = {
        arm: {q: [items(0, shift)[q], items(1, shift)[q]] for q in items(0, 0.0)}
        for arm, shift in (("both", 0.2), ("plain", 0.0))
    }
    assert found["plain", "one"].p == sign_flip_p(averaged["both"], averaged["plain"])
    assert found["plain", "two"].p == 1.0
    assert found["plain", "one"].difference == pytest.approx(0.2)
    adjusted = holm({key: test.p for key, test in found.items()} | {("evil", "two"): 1.0})  # which was not run
    assert {key: test.adjusted_p for key, test in found.items()} == {key: adjusted[key] for key in found}
    assert found["plain", "one"].adjusted_p == pytest.approx(4 * found["plain", "one"].p)
    explored = [(test.arm, test.against, test.setting, test.collection) for test in analysis.exploratory]
    assert explored == [("both", "plain", "common", "one"), ("plain", "evil", "own", "one")]
    assert analysis.exploratory[1].difference == pytest.approx(0.1)
    assert {test.adjusted_p for test in analysis.exploratory} == {None}


def test_arms_are_compared_on_the_seeds_that_both_have(evidence: Evidence) -> None:
    far = [scores("both", 1, "one", 9.2), scores("both", 1, "two", 9.0)]
    measured = kept(evidence, lambda cell: (cell.arm, cell.seed) != ("both", 1)) + far
    evidence = with_cells(evidence, measured)
    found = {(test.against, test.collection): test for test in analyse(evidence).declared}
    assert found["plain", "one"].seeds == (0, 1)
    assert found["plain", "one"].difference == pytest.approx(0.2 + 9.0 / 2)
    assert found["evil", "one"].seeds == (0,)
    assert found["evil", "one"].difference == pytest.approx(0.3)
    assert found["evil", "one"].p == sign_flip_p(*({q: [v] for q, v in items(0, s).items()} for s in (0.2, -0.1)))
    others = [*kept(evidence, lambda cell: cell.arm != "evil"), scores("evil", 7, "one", -0.1)]
    analysis = analyse(with_cells(evidence, others))
    assert "evil" not in {test.against for test in analysis.declared}
    assert analysis.sentences[1] == f"Both against {EVIL}: not run."


def test_significance_over_seeds_is_separate_from_that_over_queries(evidence: Evidence) -> None:
    """Seeds far apart: over queries of these models the difference is sure, over seeds it is not."""
    others = kept(evidence, lambda cell: cell.arm != "both" or cell.collection != "one")
    apart = [scores("both", seed, "one", shift) for seed, shift in ((0, 1.0), (1, -0.6))]
    (test, *_) = (test for test in analyse(with_cells(evidence, others + apart)).declared if test.against == "plain")
    assert test.adjusted_p is not None
    assert test.adjusted_p < 0.05
    assert test.interval[0] < 0 < test.interval[1]
    assert test.significant
    assert not test.significant_over_seeds
    above = [scores("both", seed, "one", shift) for seed, shift in ((0, 1.0), (1, 0.2))]  # both means above, but apart
    (test, *_) = (test for test in analyse(with_cells(evidence, others + above)).declared if test.against == "plain")
    assert test.interval[0] > 0
    assert test.seeds_interval is not None
    assert test.seeds_interval[0] < 0
    assert not test.significant_over_seeds


def test_better_and_worse_results_are_reported_in_the_same_words(evidence: Evidence) -> None:
    first, second = analyse(evidence).sentences
    assert first == (
        "Both against Plain on 2 collections, seeds 0, 1: higher on 1, lower on 0. Beyond chance over queries of these "
        "models: higher on 1, lower on 0. Over other seeds, too: higher on 1, lower on 0. No test, as it was not run "
        "or has no score per item: pairs."
    )
    assert "on 1 collections, seed 0: higher on 1, lower on 0." in second
    assert (
        "Over other seeds: not known from one. No test, as it was not run or has no score per item: two, pairs."
        in second
    )
    turned = replace(evidence.comparison, primary="plain", declared=["both", "missing"])
    first, second = analyse(replace(evidence, comparison=turned)).sentences
    assert (
        "seeds 0, 1: higher on 0, lower on 1. Beyond chance over queries of these models: higher on 0, lower on 1."
        in first
    )
    assert second == "Plain against missing: not run."


def test_quality_is_shown_against_compute(evidence: Evidence, tmp_path: Path) -> None:
    arms = [
        ArmRecord("plain", "Plain", "", "0", True, False, [0, 1], 0, {}),
        ArmRecord("both", "Both", "", "0", True, False, [0, 1], 5, {}),
        ArmRecord("both_2", "Both x 2", "", "0", True, False, [0, 1], 10, {}, budget=2.0),
        ArmRecord("evil", EVIL, "", "0", True, True, [0, 1], 9, {}),
    ]
    values = {"plain": (0.5, 0.7), "both": (0.6, 0.6), "both_2": (0.8,), "evil": (0.1,)}
    measured = [
        (valued(arm, seed, name, value), {})
        for arm, of in values.items()
        for seed, value in enumerate(of)
        for name in ("one", "two", "pairs")
        if (arm, name) != ("evil", "two")
    ]
    costs = {"plain": (0.0, 1e15), "both": (2e15, 1e15), "both_2": (4e15, 1e15), "evil": (0.0, 9e15)}
    runs = {
        Run(arm, "0", "own", seed): RunRecord(
            costs={"before": Cost(1.0, 1, first), "contrast": Cost(1.0, 1, second), "evaluate": Cost(9.0, 0, 7e15)}
        )
        for arm, (first, second) in costs.items()
        for seed in (0, 1)
    }
    changed = with_cells(replace(evidence, comparison=replace(evidence.comparison, arms=arms), runs=runs), measured)
    points = [(p.arm.name, p.flops, p.quality) for p in by_compute(changed, analyse(changed))]
    assert points == [
        ("plain", 1e15, {0: pytest.approx(0.5), 1: pytest.approx(0.7)}),
        ("both", 3e15, {0: pytest.approx(0.6), 1: pytest.approx(0.6)}),
        ("both_2", 5e15, {0: pytest.approx(0.8)}),
    ]
    assert "| Both x 2 | 5.000 | 0.8000 | 0: 0.8000 |" in markdown(build_report(changed))
    *_, svg = written(changed, tmp_path)
    assert svg.name == "compute.svg"
    labels = re.findall(r">(Plain|Both|Both x 2)</text>", svg.read_text(encoding="utf-8"))
    assert labels == ["Plain", "Both"], "a line for arms that differ in compute alone"
    write_comparison(tmp_path, replace(changed.comparison, key="another"))
    write_report(tmp_path)
    assert not svg.exists(), "the other comparison has no results yet"


@pytest.mark.slow
def test_the_html_is_well_formed_and_loads_no_other_file(evidence: Evidence) -> None:
    page = html(build_report(evidence))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.tags.count("svg") == 5
    assert parser.tags.count("table") >= 7
    assert "script" not in parser.tags
    assert not re.search(r'(src|href)\s*=\s*"(https?:)?//', page)
    assert EVIL not in page
    assert "not run" in page
    assert page == html(build_report(evidence))
    assert f"<td>{analyse(evidence).scores['both', 'own', 'one'].mean:.3f} [" in page
    for word in (
        "Declared tests",
        "Exploratory",
        "accuracy on held-out pairs",
        "effective rank",
        "PFLOPs",
        "A note.",
        "threads 2",
    ):
        assert word in page, word
    bare = replace(evidence, runs={run: RunRecord(items=record.items) for run, record in evidence.runs.items()})
    assert "effective rank" not in html(build_report(bare))


@pytest.mark.slow
def test_markdown_has_the_same_numbers(evidence: Evidence, tmp_path: Path) -> None:
    text = markdown(build_report(evidence))
    mean = analyse(evidence).scores["both", "own", "one"].mean
    assert f"{mean:.3f} \\[" in text
    assert "\\<b\\>&" in text
    assert "| Plain | own | one | 0, 1 | +0.200 |" in text
    (common,) = (line for line in text.splitlines() if line.startswith("| Plain | common | 0."))
    assert "; seed 0 |" in common
    for told in ("seeds, where there are several", "sign flips", "corrected for nothing", "alignment", "Minutes are"):
        assert told in text
        assert told in html(build_report(evidence))
    assert "1.5 GB" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) >= 3
    page, pages = written(evidence, tmp_path)
    assert page.read_text(encoding="utf-8") == html(build_report(evidence))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert pages.read_text(encoding="utf-8") == text


def test_no_two_of_a_dozen_lines_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """By marker and dash, without colour; an arm's style follows from its position, whatever other arms there are."""
    drawn: list[tuple[object, ...]] = []
    plot = Axes.plot

    def spy(self: Axes, *points: object, **style: object) -> object:
        drawn.append((style["marker"], style["linestyle"]))
        return plot(self, *points, **style)

    monkeypatch.setattr(Axes, "plot", spy)
    every = {str(number): [[(1, 0.0), (2, 1.0)]] for number in range(12)}
    figures.lines("Stage II: x", every)
    assert len(set(drawn)) == 12
    figures.lines("Stage II: x", every | {"3": []})
    assert drawn[12:] == drawn[:3] + drawn[4:12]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here; CI installs it")
def test_a_browser_shows_tables_and_figures(evidence: Evidence, tmp_path: Path) -> None:
    page, _ = written(evidence, tmp_path)
    browser = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,1200"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    probe = "<script>document.title = [...document.querySelectorAll('table, svg')].map(e => e.tagName + ' ' + "
    probe += "Math.round(e.getBoundingClientRect().width) + 'x' + Math.round(e.getBoundingClientRect().height))"
    shown = tmp_path / "probe.html"
    text = page.read_text(encoding="utf-8").replace("</body>", f"{probe}.join(', ')</script></body>")
    shown.write_text(text, encoding="utf-8")
    found = subprocess.run(
        [*browser, "--dump-dom", shown.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", found.stdout)
    assert title is not None
    sizes = re.findall(r"(table|svg) (\d+)x(\d+)", title[1], re.IGNORECASE)
    assert [kind.lower() for kind, _, _ in sizes].count("svg") == 5
    assert all(int(width) > 100 and int(height) > 40 for _, width, height in sizes)
    picture = tmp_path / "page.png"
    subprocess.run([*browser, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 20_000
