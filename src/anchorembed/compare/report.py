"""The report of a comparison, from its results folder alone, as HTML and as Markdown."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorembed.compare import figures
from anchorembed.compare.analysis import Analysis, Score, Test, analyse, seeds_text
from anchorembed.compare.records import OWN, ArmRecord, ComparisonRecord, Cost, accuracy_by_choice, best_choice
from anchorembed.compare.results import Evidence, read_evidence
from anchorembed.system.files import write_file


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report: an explanation, a table, and a figure as SVG with its caption; Markdown has no figures."""

    title: str
    explained: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The content of the report, the same for HTML and Markdown; ``made_with`` describes the machines."""

    comparison: ComparisonRecord
    sentences: list[str]
    sections: list[Section]
    made_with: list[str]


def write_report(folder: Path) -> list[Path]:
    """Write ``report.html`` and ``report.md`` of a results folder, and ``compute.svg`` if arms differ in compute alone.

    Returns:
        The paths written.

    Raises:
        InputError: if the folder has no comparison, or a file is damaged.
    """
    evidence = read_evidence(folder)
    report = build_report(evidence)
    files = {"report.html": html(report), "report.md": markdown(report)}
    drawn = [section.figure for section in report.sections if section.title == _BY_COMPUTE]
    if drawn and any(arm.budget != 1 for arm in evidence.comparison.arms):
        files["compute.svg"] = drawn[0]
    else:
        (folder / "compute.svg").unlink(missing_ok=True)  # of another comparison
    for name, text in files.items():
        write_file(folder / name, text)
    return [folder / name for name in files]


def build_report(evidence: Evidence) -> Report:
    """The report of all finished runs; empty sections are left out."""
    analysis = analyse(evidence)
    return Report(evidence.comparison, analysis.sentences, list(_sections(evidence, analysis)), _made_with(evidence))


def html(report: Report) -> str:
    """The report as one HTML file that loads no others."""
    environment = Environment(
        loader=PackageLoader("anchorembed.compare", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(report=report)


def markdown(report: Report) -> str:
    """The report's sentences and tables as Markdown."""
    comparison = report.comparison
    lines = [f"# {_escaped(comparison.title)}", "", *comparison.notes, ""]
    lines += [f"- {_escaped(sentence)}" for sentence in report.sentences]
    for section in report.sections:
        if section.rows:
            lines += ["", f"## {_escaped(section.title)}", "", _escaped(section.explained), ""]
            lines += _table(section.heads, section.rows)
    lines += ["", "## To repeat it", "", "```", comparison.command, "```", "", *report.made_with, ""]
    lines += ["```yaml", comparison.recipe, "```"]
    return "\n".join(lines) + "\n"


def _sections(evidence: Evidence, analysis: Analysis) -> Iterator[Section]:
    comparison = evidence.comparison
    titles = comparison.titles
    explained = _explained(titles[comparison.primary])
    for title, names in comparison.tables.items():
        heads = ["arm", "settings", *(f"{name} {analysis.metrics.get(name, '')}".strip() for name in names)]
        rows = list(_score_rows(evidence, analysis, names))
        yield Section(title, explained["scores"], heads, rows, _score_figure(evidence, analysis, names), _SCORE_CAPTION)
    if points := list(by_compute(evidence, analysis)):
        heads, rows = ["arm", "model PFLOPs", "mean of all collections", "seeds"], [point.row for point in points]
        yield Section(_BY_COMPUTE, explained["compute"], heads, rows, _compute_figure(points), "Bar: seeds.")
    for title, tests in (("Declared tests", analysis.declared), ("Exploratory", analysis.exploratory)):
        if tests:
            yield Section(title, explained[title], _TEST_HEADS, [_test_row(test, titles) for test in tests])
    for title, series in _curves(evidence).items():
        yield Section(title, figure=figures.lines(title, series))
    if rows := list(_isotropy_rows(evidence)):
        yield Section("How vectors fill their space", explained["isotropy"], _ISOTROPY_HEADS, rows)
    if rows := list(_cost_rows(evidence)):
        yield Section("Cost", explained["cost"], _COST_HEADS, rows)
    yield Section(
        "Arms", explained["arms"], ["arm", "what", "settings"], [_arm_row(evidence, arm) for arm in comparison.arms]
    )


def _explained(primary: str) -> dict[str, str]:
    """Explanations of the numbers in each section."""
    return {
        "scores": "Mean over seeds; 95 % interval: seeds, where there are several, then queries or items, resampled "
        "10,000 times as if each were independent, too narrow with few seeds; each seed. Items are queries, texts "
        "(accuracy: means over draws of training texts) or pairs (Spearman: jackknife pseudo-values). Settings: own, "
        "each arm's best choice of the grid on held-out training pairs, or the recipe's without a grid; common, those "
        f"of {primary}, with the first seed only.",
        "compute": "The mean of all collections' main metrics, over the seeds that have all, at own settings; model "
        "FLOPs of training, both stages. A line joins arms that differ in compute alone.",
        "Declared tests": f"{primary} against each arm declared beforehand, on the seeds that both have: each query's "
        "score averaged over seeds, 10,000 sign flips over queries; Holm's correction over these tests and those still "
        "to be run. Beyond chance over queries of these trained models: p, Holm below 0.05. Over other seeds, too: "
        "besides, neither interval has 0, that of resampled seeds and queries, too narrow with few seeds, nor Welch's "
        "t of the seeds' means; these are corrected for nothing.",
        "Exploratory": "Not declared beforehand: p as it is, corrected for nothing, no evidence.",
        "isotropy": "On held-out pairs, which are others with each seed. Mean cosine of two documents and effective "
        "rank: low and high is even; alignment: mean squared distance of a query and its document; uniformity: lower "
        "is more even.",
        "cost": "before: the stage before Stage II; contrast: Stage II. Minutes are with held-out evaluations. "
        "What was trained once and used twice is in both rows: Stage I of an arm's own and common settings, Stage II "
        "of its choice in the grid.",
        "arms": "What each arm trains, and the settings that it does not share with the others.",
    }


_TEST_HEADS = [
    *("arm", "against", "settings", "collection", "seeds", "difference"),
    *("95 % interval", "95 %, seeds' t", "p", "p, Holm"),
]
_COST_HEADS = ["arm", "settings", "seed", "stage", "minutes", "own tokens", "model PFLOPs", "peak memory"]
_SCORE_CAPTION = "Filled: mean over seeds; hollow: each seed; bar: 95 % interval."
_BY_COMPUTE = "Quality against compute"
_COMPUTE_HEADS = ["arm", "model PFLOPs", "mean of all collections", "seeds"]
_ISOTROPY_HEADS = [*("arm", "settings", "seed", "model"), *("mean cosine", "effective rank", "alignment", "uniformity")]


def _score_rows(evidence: Evidence, analysis: Analysis, names: Iterable[str]) -> Iterable[list[str]]:
    """A row for each arm and setting: mean, interval and seeds of each collection."""
    for setting in sorted({cell.setting for cell in evidence.cells} | {OWN}, reverse=True):
        for arm in evidence.comparison.arms:
            scores = [analysis.scores.get((arm.name, setting, name)) for name in names]
            if setting == OWN or any(scores):
                yield [arm.title, setting, *(_score_cell(score) if score else "not run" for score in scores)]


def _score_cell(score: Score) -> str:
    interval = f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]" if score.interval else ""
    values = f": {', '.join(f'{value:.3f}' for value in score.by_seed.values())}" if len(score.by_seed) > 1 else ""
    return f"{score.mean:.3f}{interval}; {seeds_text(list(score.by_seed))}{values}"


def _test_row(test: Test, titles: dict[str, str]) -> list[str]:
    adjusted = "" if test.adjusted_p is None else f"{test.adjusted_p:.4f}"
    bounds = (test.interval, test.seeds_interval)
    intervals = [f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "" for interval in bounds]
    seeds = ", ".join(map(str, test.seeds))
    numbers = [f"{test.difference:+.3f}", *intervals, f"{test.p:.4f}", adjusted]
    return [titles[test.arm], titles[test.against], test.setting, test.collection, seeds, *numbers]


def _cost_rows(evidence: Evidence) -> Iterable[list[str]]:
    """Costs of each stage of each run, then of each trial of the grid."""
    titles = evidence.comparison.titles
    for run, record in evidence.runs.items():
        for stage, cost in record.costs.items():
            yield [titles[run.arm], run.setting, str(run.seed), stage, *_cost_cells(cost)]
    for score in evidence.grid:
        yield [titles[score.arm], "grid", str(score.seed), score.choice, *_cost_cells(score.cost)]


def _cost_cells(cost: Cost) -> list[str]:
    memory = f"{cost.peak_gb:.1f} GB" if cost.peak_gb else ""
    return [f"{cost.seconds / 60:.1f}", f"{cost.tokens:,}", f"{cost.flops / 1e15:.3f}", memory]


def _isotropy_rows(evidence: Evidence) -> Iterable[list[str]]:
    for run, record in evidence.runs.items():
        for model, measured in record.isotropy.items():
            numbers = (measured.mean_cosine, measured.effective_rank, measured.alignment, measured.uniformity)
            first_cells = [evidence.comparison.titles[run.arm], run.setting, str(run.seed), model]
            yield [*first_cells, *(f"{number:.3f}" for number in numbers)]


def _made_with(evidence: Evidence) -> list[str]:
    """Versions, threads and number format of the runs; several lines if machines differed."""
    described = [record.made_with.items() for record in evidence.runs.values() if record.made_with]
    return list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in items) for items in described))


def _arm_row(evidence: Evidence, arm: ArmRecord) -> list[str]:
    """An arm's title, description, seeds, steps, settings and choice from the grid."""
    seeds_run = {cell.seed for cell in evidence.cells if cell.arm == arm.name and cell.setting == OWN}
    settings = {
        "seeds run": ", ".join(str(seed) for seed in arm.seeds if seed in seeds_run) or "none",
        "planned": ", ".join(map(str, arm.seeds)),
    }
    if arm.steps:
        settings["Stage II's additional steps" if arm.longer else "steps before Stage II"] = str(arm.steps)
    settings |= arm.settings
    accuracy, choices = accuracy_by_choice(evidence.grid, arm), evidence.comparison.choices
    if accuracy:
        if accuracy.keys() >= set(choices):
            settings["chosen for Stage II"] = best_choice(choices, accuracy)
        settings["held-out accuracy of the choices"] = ", ".join(
            f"{name}: {accuracy[name]:.3f}" for name in sorted(accuracy)
        )
    return [arm.title, arm.what, "; ".join(f"{key}: {value}" for key, value in settings.items())]


def _score_figure(evidence: Evidence, analysis: Analysis, names: Iterable[str]) -> str:
    """The figure of a table: every arm's mean, seeds and interval on each collection, at its own settings."""
    panels = []
    for name in names:
        rows = [
            (arm.title, score.mean, list(score.by_seed.values()), score.interval)
            for arm in evidence.comparison.arms
            if (score := analysis.scores.get((arm.name, OWN, name))) is not None
        ]
        if rows:
            panels.append((f"{name}, {analysis.metrics[name]}", rows))
    return figures.dots(panels) if panels else ""


@dataclass(frozen=True, slots=True)
class Point:
    """An arm's model FLOPs of training, averaged over seeds, and by seed the mean of all collections' main metrics."""

    arm: ArmRecord
    flops: float
    quality: dict[int, float]

    @property
    def row(self) -> list[str]:
        """The row of a table: the arm, its PFLOPs, the mean over seeds, and each seed."""
        seeds = ", ".join(f"{seed}: {value:.4f}" for seed, value in self.quality.items())
        return [self.arm.title, f"{self.flops / 1e15:.3f}", f"{fmean(self.quality.values()):.4f}", seeds]


def by_compute(evidence: Evidence, analysis: Analysis) -> Iterator[Point]:
    """A point for each trained arm that has a seed with all collections."""
    for arm in evidence.comparison.arms:
        keys = [(arm.name, OWN, name) for name in evidence.comparison.revisions]
        if not arm.trained or not all(key in analysis.scores for key in keys):
            continue
        collections = [analysis.scores[key].by_seed for key in keys]
        seeds = [seed for seed in arm.seeds if all(seed in values for values in collections)]
        costs = [evidence.runs[arm.run(OWN, seed)].costs for seed in seeds]
        totals = [sum(cost.flops for stage, cost in stages.items() if stage != "evaluate") for stages in costs]
        if flops := [total for total in totals if total]:
            yield Point(arm, fmean(flops), {seed: fmean(values[seed] for values in collections) for seed in seeds})


def _compute_figure(points: Sequence[Point]) -> str:
    """The figure of quality against compute: a line, from Stage II alone on, for arms that differ in compute alone."""
    lines: dict[Hashable, list[Point]] = {}
    for point in points:
        arm = point.arm
        lines.setdefault((arm.longer, bool(arm.steps), *sorted(arm.settings.items())), []).append(point)
    alone = [point for point in points if not point.arm.steps and not point.arm.settings]
    return figures.by_compute(
        {
            line[0].arm.title: [
                (point.flops / 1e15, list(point.quality.values()))
                for point in sorted([*alone, *line] if line != alone else line, key=lambda point: point.flops)
            ]
            for line in lines.values()
        }
    )


def _curves(evidence: Evidence) -> dict[str, dict[str, list[figures.Points]]]:
    """Curves at own settings, by metric, then by arm: a list of points for each seed."""
    plots: dict[str, dict[str, list[figures.Points]]] = {}
    titles = evidence.comparison.titles
    for run, record in evidence.runs.items():
        for stage, lines in record.curves.items() if run.setting == OWN else ():
            stage_title = "Stage II" if stage == "contrast" else "Before Stage II"
            for name in dict.fromkeys(name for line in lines for name in line if name in _CURVE_TITLES):
                points = [(int(line["step"]), line[name]) for line in lines if name in line]
                no_points: dict[str, list[figures.Points]] = {title: [] for title in titles.values()}
                plots.setdefault(f"{stage_title}: {_CURVE_TITLES[name]}", no_points)[titles[run.arm]].append(points)
    return plots


_CURVE_TITLES = {
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
    "loss_read_q2d": "loss of telling a document's query from three others by the decoder, nats a text",
    "loss_read_d2q": "loss of telling a query's document from three others by the decoder, nats a text",
    "loss_read_d2d": "loss of telling a document's own vector from three others by the decoder, nats a text",
    "gain_bag_q2d": "anchor gain of documents' bags, nats a token",
    "gain_bag_d2q": "anchor gain of queries' bags, nats a token",
}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escaped, heads)) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]


def _escaped(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    for character in "\\`*_<>|[]#":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
