"""The report of a comparison: numbers first (`analyse`), then the same numbers as HTML and as Markdown.

Bad news is said in the same words as good news, what was not run is said to be missing, and only tests that were
declared beforehand are corrected together and called tests; anything else is called exploratory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorembed import figures
from anchorembed.checkpoint import write_file
from anchorembed.results import OWN
from anchorembed.significance import bootstrap_interval, holm, paired_interval, sign_flip_p

_LEVEL = 0.05
Key = tuple[str, str, str]  # arm, setting, collection


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: its name, title, what it is in a sentence, and its settings."""

    name: str
    title: str
    what: str
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage cost: seconds, own tokens of its texts, model FLOPs, peak memory."""

    seconds: float
    tokens: int
    flops: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class Cell:
    """A result: ``per_item`` holds each query's or item's score, empty where the value is no mean over items."""

    arm: str
    setting: str
    seed: int
    collection: str
    metric: str
    value: float
    per_item: dict[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps of a stage."""

    arm: str
    setting: str
    seed: int
    stage: str
    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a report is made from."""

    title: str
    arms: list[Arm]
    cells: list[Cell]
    costs: dict[tuple[str, str, int], dict[str, Cost]]
    curves: list[Curve]
    isotropy: list[tuple[str, str, int, str, dict[str, float]]]
    primary: str
    declared: list[str]
    explore: dict[str, list[str]]  # arms -> those each is tested against, too
    notes: list[str]
    recipe: str
    command: str
    made_with: list[str]  # what computed it: versions, threads, number format; several if machines differed
    tables: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Score:
    """An arm's result on a collection: mean over seeds, each seed's value, 95 % interval where items allow one."""

    mean: float
    seeds: dict[int, float]
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Test:
    """An arm, at its own settings, against another, on the seeds that both have; p is adjusted if it was declared."""

    arm: str
    against: str
    setting: str
    collection: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    p: float
    adjusted: float | None = None

    @property
    def sure(self) -> bool:
        """Beyond chance: over queries by the adjusted p, and over seeds and queries by the interval."""
        low, high = self.interval
        return self.adjusted is not None and self.adjusted < _LEVEL and not low <= 0 <= high


@dataclass(frozen=True, slots=True)
class Analysis:
    """The numbers of the report."""

    scores: dict[Key, Score]
    metrics: dict[str, str]
    declared: list[Test]
    exploratory: list[Test]
    sentences: list[str] = field(default_factory=list)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def analyse(comparison: Comparison) -> Analysis:
    """Compute every number of the report."""
    groups: dict[Key, list[Cell]] = {}
    for cell in comparison.cells:
        groups.setdefault((cell.arm, cell.setting, cell.collection), []).append(cell)
    scores = {key: _score(cells) for key, cells in groups.items()}
    tests = list(_tests(comparison, groups))
    declared = [test for test in tests if _declared(comparison, test)]
    family = dict.fromkeys(_family(comparison, scores), 1.0)  # a test that was not run yet counts as one, too
    adjusted = holm(family | {(test.against, test.collection): test.p for test in declared})
    declared = [replace(test, adjusted=adjusted[test.against, test.collection]) for test in declared]
    others = [test for test in tests if not _declared(comparison, test)]
    metrics = {cell.collection: cell.metric for cell in comparison.cells}
    sentences = [
        _sentence(comparison, name, declared, sum(arm == name for arm, _ in family)) for name in comparison.declared
    ]
    return Analysis(scores, metrics, declared, others, sentences)


def _declared(comparison: Comparison, test: Test) -> bool:
    return test.arm == comparison.primary and test.setting == OWN and test.against in comparison.declared


def _family(comparison: Comparison, scores: dict[Key, Score]) -> list[tuple[str, str]]:
    """Declared arms x collections, but for metrics that are no mean over items and cannot be tested."""
    testable = {collection for (_, _, collection), score in scores.items() if score.interval is not None}
    untested = {collection for _, _, collection in scores} - testable
    names = [name for names in comparison.tables.values() for name in names if name not in untested]
    arms = {arm.name for arm in comparison.arms}
    return [(arm, name) for arm in comparison.declared if arm in arms for name in names]


def _score(cells: Sequence[Cell]) -> Score:
    seeds = {cell.seed: cell.value for cell in sorted(cells, key=lambda cell: cell.seed)}
    matrix = _matrix(cells)
    interval = bootstrap_interval(matrix) if matrix is not None else None
    return Score(sum(seeds.values()) / len(seeds), seeds, interval)


def _matrix(cells: Sequence[Cell]) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]] | None":
    """Scores [seeds, items], items in the order of their ids; None where there are none, or seeds differ in items."""
    items = sorted(cells[0].per_item)
    if not items or any(sorted(cell.per_item) != items for cell in cells):
        return None
    return np.array([[cell.per_item[item] for item in items] for cell in cells])


def _tests(comparison: Comparison, groups: dict[Key, list[Cell]]) -> Iterable[Test]:
    """The primary arm against all others, then those that are explored against the ones named."""
    for key, cells in groups.items():
        if key[0] != comparison.primary:
            yield from _test(comparison.primary, key, cells, groups)
    for arm, others in comparison.explore.items():
        for key, cells in groups.items():
            if key[0] in others and key[1] == OWN:
                yield from _test(arm, key, cells, groups)


def _test(arm: str, key: Key, second_cells: list[Cell], groups: dict[Key, list[Cell]]) -> Iterable[Test]:
    """An arm at its own settings against the cells of ``key``; none where they share no seed, or items differ."""
    against, setting, collection = key
    first_cells = groups.get((arm, OWN, collection), [])
    seeds = sorted({cell.seed for cell in first_cells} & {cell.seed for cell in second_cells})
    if not seeds:
        return
    first_cells, second_cells = (
        [cell for cell in cells if cell.seed in seeds] for cells in (first_cells, second_cells)
    )
    first, second = _matrix(first_cells), _matrix(second_cells)
    if first is not None and second is not None and sorted(first_cells[0].per_item) == sorted(second_cells[0].per_item):
        yield Test(
            arm=arm,
            against=against,
            setting=setting,
            collection=collection,
            seeds=tuple(seeds),
            difference=float(first.mean() - second.mean()),
            interval=paired_interval(first, second),
            p=sign_flip_p(_by_item(first), _by_item(second)),
        )


def _by_item(scores_SQ: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> dict[str, list[float]]:
    return {str(number): column for number, column in enumerate(scores_SQ.T.tolist())}


def _sentence(comparison: Comparison, against: str, declared: Sequence[Test], wanted: int) -> str:
    """What the declared tests against one arm, of which ``wanted`` were declared, say in words."""
    titles = {arm.name: arm.title for arm in comparison.arms}
    tests = [test for test in declared if test.against == against]
    first, second = titles.get(comparison.primary, comparison.primary), titles.get(against, against)
    if not tests:
        return f"{first} against {second}: not run."
    sure = [test for test in tests if test.sure]
    better, worse = (sum(sign * test.difference > 0 for test in tests) for sign in (1, -1))
    surely_better, surely_worse = (sum(sign * test.difference > 0 for test in sure) for sign in (1, -1))
    seeds = " or ".join(dict.fromkeys(_seeds(test.seeds) for test in tests))
    return (
        f"{first} against {second}, {seeds}: higher on {better} of {len(tests)} collections, beyond chance on "
        f"{surely_better}; lower on {worse}, beyond chance on {surely_worse}."
        + (f" Not run: {wanted - len(tests)} collections." if len(tests) < wanted else "")
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


# --- Pages -----------------------------------------------------------------------------------------------------------


def write(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(comparison)
    page, text = folder / "report.html", folder / "report.md"
    write_file(page, html(comparison, analysis))
    write_file(text, markdown(comparison, analysis))
    return page, text


def html(comparison: Comparison, analysis: Analysis) -> str:
    """The page, in one file that loads nothing."""
    environment = Environment(
        loader=PackageLoader("anchorembed", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja")
    titles = {arm.name: arm.title for arm in comparison.arms}
    return page.render(
        comparison=comparison,
        analysis=analysis,
        explained=_explained(titles.get(comparison.primary, comparison.primary)),
        tested=_TESTED,
        spread=_ISOTROPY,
        spent=_COSTS,
        tables=[
            (title, _heads(analysis, names), list(_rows(comparison, analysis, names)))
            for title, names in _tables(comparison)
        ],
        dots=[(title, _dots(comparison, analysis, names)) for title, names in _tables(comparison)],
        plots=[(title, figures.lines(title, series)) for title, series in _series(comparison, titles)],
        declared=[_tested(test, titles) for test in analysis.declared],
        exploratory=[_tested(test, titles) for test in analysis.exploratory],
        costs=list(_costs(comparison, titles)),
        isotropy=list(_isotropy(comparison, titles)),
    )


def markdown(comparison: Comparison, analysis: Analysis) -> str:
    """The tables and sentences of the page."""
    titles = {arm.name: arm.title for arm in comparison.arms}
    told = {name: _cell(text) for name, text in _explained(titles.get(comparison.primary, comparison.primary)).items()}
    lines = [f"# {_cell(comparison.title)}", "", *comparison.notes, ""]
    lines += [f"- {_cell(sentence)}" for sentence in analysis.sentences]
    for title, names in _tables(comparison):
        lines += ["", f"## {_cell(title)}", "", told["scores"], ""]
        lines += _table(_heads(analysis, names), _rows(comparison, analysis, names))
    for title, name, heads, rows in (
        ("Declared tests", "declared", _TESTED, [_tested(test, titles) for test in analysis.declared]),
        ("Exploratory", "exploratory", _TESTED, [_tested(test, titles) for test in analysis.exploratory]),
        ("How vectors fill their space", "isotropy", _ISOTROPY, _isotropy(comparison, titles)),
        ("Cost", "cost", _COSTS, _costs(comparison, titles)),
    ):
        lines += ["", f"## {title}", "", told[name], "", *_table(heads, rows)]
    lines += ["", "## Arms", "", *_table(["arm", "what", "settings"], [_arm(arm) for arm in comparison.arms])]
    lines += ["", "## To repeat it", "", "```", comparison.command, "```", "", *comparison.made_with, ""]
    lines += ["```yaml", comparison.recipe, "```"]
    return "\n".join(lines) + "\n"


def _explained(primary: str) -> dict[str, str]:
    """What the numbers of each part of the page are."""
    return {
        "scores": "Mean over seeds; 95 % interval: seeds, where there are several, then queries or items, resampled "
        "10,000 times; each seed. Items are queries, texts (accuracy: means over draws of training texts) or pairs "
        "(Spearman: jackknife pseudo-values). Settings: own, each arm's best choice of the grid on held-out training "
        f"pairs, or the recipe's without a grid; common, those of {primary}, with the first seed only.",
        "declared": f"{primary} against each arm declared beforehand, on the seeds that both have: each query's score "
        "averaged over seeds, 10,000 sign flips over queries; Holm's correction over these tests and those still to be "
        "run. Beyond chance: p, Holm below 0.05, which is about queries of these trained models, and an interval, "
        "which is about other seeds, too, without 0.",
        "exploratory": "Not declared beforehand: p as it is, corrected for nothing, no evidence.",
        "isotropy": "On held-out pairs, which are others with each seed. Mean cosine of two documents and effective "
        "rank: low and high is even; alignment: mean squared distance of a query and its document; uniformity: lower "
        "is more even.",
        "cost": "Minutes are with evaluations on held-out pairs. What was trained once and used twice is in both rows: "
        "Stage I of an arm's own and common settings, Stage II of its choice in the grid.",
    }


_TESTED = ["arm", "against", "settings", "collection", "seeds", "difference", "95 % interval", "p", "p, Holm"]
_COSTS = ["arm", "settings", "seed", "stage", "minutes", "own tokens", "model PFLOPs", "peak memory"]
_ISOTROPY = ["arm", "settings", "seed", "model", "mean cosine", "effective rank", "alignment", "uniformity"]


def _tables(comparison: Comparison) -> list[tuple[str, list[str]]]:
    return list(comparison.tables.items())


def _heads(analysis: Analysis, names: Sequence[str]) -> list[str]:
    return ["arm", "settings", *(f"{name} {analysis.metrics.get(name, '')}".strip() for name in names)]


def _rows(comparison: Comparison, analysis: Analysis, names: Sequence[str]) -> Iterable[list[str]]:
    """An arm's row at each setting: mean, interval and seeds of each collection; the best own mean is marked."""
    best = {
        name: max((score.mean for key, score in analysis.scores.items() if key[1:] == (OWN, name)), default=None)
        for name in names
    }
    settings = sorted({cell.setting for cell in comparison.cells} | {OWN}, reverse=True)
    for setting in settings:
        for arm in comparison.arms:
            found = [analysis.scores.get((arm.name, setting, name)) for name in names]
            if setting != OWN and not any(found):
                continue
            shown = [
                _shown(score, setting == OWN and score.mean == best[name]) if score is not None else "not run"
                for name, score in zip(names, found, strict=True)
            ]
            yield [arm.title, setting, *shown]


def _shown(score: Score, best: bool) -> str:
    mark = " (best)" if best else ""
    interval = f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]" if score.interval else ""
    values = f": {', '.join(f'{value:.3f}' for value in score.seeds.values())}" if len(score.seeds) > 1 else ""
    return f"{score.mean:.3f}{mark}{interval}; {_seeds(list(score.seeds))}{values}"


def _tested(test: Test, titles: dict[str, str]) -> list[str]:
    low, high = test.interval
    adjusted = "" if test.adjusted is None else f"{test.adjusted:.4f}"
    arm, against = (titles.get(name, name) for name in (test.arm, test.against))
    interval = f"[{low:+.3f}, {high:+.3f}]"
    seeds = ", ".join(map(str, test.seeds))
    numbers = [f"{test.difference:+.3f}", interval, f"{test.p:.4f}", adjusted]
    return [arm, against, test.setting, test.collection, seeds, *numbers]


def _costs(comparison: Comparison, titles: dict[str, str]) -> Iterable[list[str]]:
    for (arm, setting, seed), stages in comparison.costs.items():
        for stage, cost in stages.items():
            figures_of = [f"{cost.seconds / 60:.1f}", f"{cost.tokens:,}", f"{cost.flops / 1e15:.3f}"]
            memory = f"{cost.peak_gb:.1f} GB" if cost.peak_gb else ""
            yield [titles.get(arm, arm), setting, str(seed), stage, *figures_of, memory]


def _isotropy(comparison: Comparison, titles: dict[str, str]) -> Iterable[list[str]]:
    for arm, setting, seed, checkpoint, values in comparison.isotropy:
        measured = [f"{values[name]:.3f}" for name in ("mean_cosine", "effective_rank", "alignment", "uniformity")]
        yield [titles.get(arm, arm), setting, str(seed), checkpoint, *measured]


def _arm(arm: Arm) -> list[str]:
    return [arm.title, arm.what, "; ".join(f"{key}: {value}" for key, value in arm.settings.items())]


def _dots(comparison: Comparison, analysis: Analysis, names: Sequence[str]) -> str:
    """Every arm's mean, seeds and interval on each collection of a table, at its own settings."""
    panels = []
    for name in names:
        rows = [
            (arm.title, score.mean, list(score.seeds.values()), score.interval)
            for arm in comparison.arms
            if (score := analysis.scores.get((arm.name, OWN, name))) is not None
        ]
        if rows:
            panels.append((f"{name}, {analysis.metrics[name]}", rows))
    return figures.dots(panels) if panels else ""


def _series(comparison: Comparison, titles: dict[str, str]) -> list[tuple[str, dict[str, list[figures.Points]]]]:
    """Curves at own settings by what they show, then by arm: one list of points a seed."""
    plots: dict[str, dict[str, list[figures.Points]]] = {}
    for curve in comparison.curves:
        if curve.setting != OWN or curve.name not in _PLOTTED:
            continue
        stage = "Stage II" if curve.stage == "contrast" else "Before Stage II"
        arm = titles.get(curve.arm, curve.arm)
        points = list(zip(curve.steps, curve.values, strict=True))
        none: dict[str, list[figures.Points]] = {arm.title: [] for arm in comparison.arms}  # its place is its style
        plots.setdefault(f"{stage}: {_PLOTTED[curve.name]}", none).setdefault(arm, []).append(points)
    return list(plots.items())


_PLOTTED = {
    "held_out_accuracy": "accuracy on held-out pairs",
    "loss_q2d": "loss of writing documents from queries, nats a token",
    "loss_d2q": "loss of writing queries from documents, nats a token",
    "loss_d2d": "loss of writing documents from themselves, nats a token",
    "loss_next_token": "loss of next tokens without a vector, nats a token",
    "gain_q2d": "anchor gain of writing documents, nats a token",
    "gain_d2q": "anchor gain of writing queries, nats a token",
    "loss_bag_q2d": "loss of documents' bags from queries' vectors, nats a token",
    "loss_bag_d2q": "loss of queries' bags from documents' vectors, nats a token",
    "loss_bag_d2d": "loss of documents' bags from their own vectors, nats a token",
    "gain_bag_q2d": "anchor gain of documents' bags, nats a token",
    "gain_bag_d2q": "anchor gain of queries' bags, nats a token",
}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, heads)) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    """Text that Markdown shows as it is."""
    for sign in "\\`*_<>|[]#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
