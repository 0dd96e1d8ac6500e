"""The report of a comparison: the numbers of `analysing.py`, the same as HTML and as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorembed.compare import figures
from anchorembed.compare.analysis import Analysis, ArmShown, Evidence, Score, Test, analyse, seeds_text
from anchorembed.compare.results import OWN
from anchorembed.system.files import write_file


def write(evidence: Evidence, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(evidence)
    page, text = folder / "report.html", folder / "report.md"
    write_file(page, html(evidence, analysis))
    write_file(text, markdown(evidence, analysis))
    return page, text


def html(evidence: Evidence, analysis: Analysis) -> str:
    """The page, in one file that loads nothing."""
    environment = Environment(
        loader=PackageLoader("anchorembed.compare", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja")
    titles = {arm.name: arm.title for arm in evidence.arms}
    return page.render(
        evidence=evidence,
        analysis=analysis,
        explained=_explained(titles.get(evidence.primary, evidence.primary)),
        tested=_TESTED,
        spread=_ISOTROPY,
        spent=_COSTS,
        tables=[
            (title, _heads(analysis, names), list(_rows(evidence, analysis, names)))
            for title, names in _tables(evidence)
        ],
        dots=[(title, _dots(evidence, analysis, names)) for title, names in _tables(evidence)],
        plots=[(title, figures.lines(title, series)) for title, series in _series(evidence, titles)],
        declared=[_tested(test, titles) for test in analysis.declared],
        exploratory=[_tested(test, titles) for test in analysis.exploratory],
        costs=list(_costs(evidence, titles)),
        isotropy=list(_isotropy(evidence, titles)),
    )


def markdown(evidence: Evidence, analysis: Analysis) -> str:
    """The tables and sentences of the page."""
    titles = {arm.name: arm.title for arm in evidence.arms}
    told = {name: _cell(text) for name, text in _explained(titles.get(evidence.primary, evidence.primary)).items()}
    lines = [f"# {_cell(evidence.title)}", "", *evidence.notes, ""]
    lines += [f"- {_cell(sentence)}" for sentence in analysis.sentences]
    for title, names in _tables(evidence):
        lines += ["", f"## {_cell(title)}", "", told["scores"], ""]
        lines += _table(_heads(analysis, names), _rows(evidence, analysis, names))
    for title, name, heads, rows in (
        ("Declared tests", "declared", _TESTED, [_tested(test, titles) for test in analysis.declared]),
        ("Exploratory", "exploratory", _TESTED, [_tested(test, titles) for test in analysis.exploratory]),
        ("How vectors fill their space", "isotropy", _ISOTROPY, _isotropy(evidence, titles)),
        ("Cost", "cost", _COSTS, _costs(evidence, titles)),
    ):
        lines += ["", f"## {title}", "", told[name], "", *_table(heads, rows)]
    lines += ["", "## Arms", "", *_table(["arm", "what", "settings"], [_arm(arm) for arm in evidence.arms])]
    lines += ["", "## To repeat it", "", "```", evidence.command, "```", "", *evidence.made_with, ""]
    lines += ["```yaml", evidence.recipe, "```"]
    return "\n".join(lines) + "\n"


def _explained(primary: str) -> dict[str, str]:
    """What the numbers of each part of the page are."""
    return {
        "scores": "Mean over seeds; 95 % interval: seeds, where there are several, then queries or items, resampled "
        "10,000 times as if each were independent, too narrow with few seeds; each seed. Items are queries, texts "
        "(accuracy: means over draws of training texts) or pairs (Spearman: jackknife pseudo-values). Settings: own, "
        "each arm's best choice of the grid on held-out training pairs, or the recipe's without a grid; common, those "
        f"of {primary}, with the first seed only.",
        "declared": f"{primary} against each arm declared beforehand, on the seeds that both have: each query's score "
        "averaged over seeds, 10,000 sign flips over queries; Holm's correction over these tests and those still to be "
        "run. Beyond chance over queries of these trained models: p, Holm below 0.05. Over other seeds, too: besides, "
        "neither interval has 0, that of resampled seeds and queries, too narrow with few seeds, nor Welch's t of the "
        "seeds' means; these are corrected for nothing.",
        "exploratory": "Not declared beforehand: p as it is, corrected for nothing, no evidence.",
        "isotropy": "On held-out pairs, which are others with each seed. Mean cosine of two documents and effective "
        "rank: low and high is even; alignment: mean squared distance of a query and its document; uniformity: lower "
        "is more even.",
        "cost": "Minutes are with evaluations on held-out pairs. What was trained once and used twice is in both rows: "
        "Stage I of an arm's own and common settings, Stage II of its choice in the grid.",
    }


_INTERVALS = ["95 % interval", "95 %, seeds' t"]
_TESTED = ["arm", "against", "settings", "collection", "seeds", "difference", *_INTERVALS, "p", "p, Holm"]
_COSTS = ["arm", "settings", "seed", "stage", "minutes", "own tokens", "model PFLOPs", "peak memory"]
_ISOTROPY = ["arm", "settings", "seed", "model", "mean cosine", "effective rank", "alignment", "uniformity"]


def _tables(evidence: Evidence) -> list[tuple[str, list[str]]]:
    return list(evidence.tables.items())


def _heads(analysis: Analysis, names: Sequence[str]) -> list[str]:
    return ["arm", "settings", *(f"{name} {analysis.metrics.get(name, '')}".strip() for name in names)]


def _rows(evidence: Evidence, analysis: Analysis, names: Sequence[str]) -> Iterable[list[str]]:
    """An arm's row at each setting: mean, interval and seeds of each collection."""
    settings = sorted({cell.setting for cell in evidence.cells} | {OWN}, reverse=True)
    for setting in settings:
        for arm in evidence.arms:
            found = [analysis.scores.get((arm.name, setting, name)) for name in names]
            if setting != OWN and not any(found):
                continue
            yield [arm.title, setting, *(_shown(score) if score else "not run" for score in found)]


def _shown(score: Score) -> str:
    interval = f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]" if score.interval else ""
    values = f": {', '.join(f'{value:.3f}' for value in score.seeds.values())}" if len(score.seeds) > 1 else ""
    return f"{score.mean:.3f}{interval}; {seeds_text(list(score.seeds))}{values}"


def _tested(test: Test, titles: dict[str, str]) -> list[str]:
    adjusted = "" if test.adjusted is None else f"{test.adjusted:.4f}"
    arm, against = (titles.get(name, name) for name in (test.arm, test.against))
    intervals = [f"[{each[0]:+.3f}, {each[1]:+.3f}]" if each else "" for each in (test.interval, test.over_seeds)]
    seeds = ", ".join(map(str, test.seeds))
    numbers = [f"{test.difference:+.3f}", *intervals, f"{test.p:.4f}", adjusted]
    return [arm, against, test.setting, test.collection, seeds, *numbers]


def _costs(evidence: Evidence, titles: dict[str, str]) -> Iterable[list[str]]:
    for (arm, setting, seed), stages in evidence.costs.items():
        for stage, cost in stages.items():
            figures_of = [f"{cost.seconds / 60:.1f}", f"{cost.tokens:,}", f"{cost.flops / 1e15:.3f}"]
            memory = f"{cost.peak_gb:.1f} GB" if cost.peak_gb else ""
            yield [titles.get(arm, arm), setting, str(seed), stage, *figures_of, memory]


def _isotropy(evidence: Evidence, titles: dict[str, str]) -> Iterable[list[str]]:
    for arm, setting, seed, checkpoint, values in evidence.isotropy:
        measured = [f"{values[name]:.3f}" for name in ("mean_cosine", "effective_rank", "alignment", "uniformity")]
        yield [titles.get(arm, arm), setting, str(seed), checkpoint, *measured]


def _arm(arm: ArmShown) -> list[str]:
    return [arm.title, arm.what, "; ".join(f"{key}: {value}" for key, value in arm.settings.items())]


def _dots(evidence: Evidence, analysis: Analysis, names: Sequence[str]) -> str:
    """Every arm's mean, seeds and interval on each collection of a table, at its own settings."""
    panels = []
    for name in names:
        rows = [
            (arm.title, score.mean, list(score.seeds.values()), score.interval)
            for arm in evidence.arms
            if (score := analysis.scores.get((arm.name, OWN, name))) is not None
        ]
        if rows:
            panels.append((f"{name}, {analysis.metrics[name]}", rows))
    return figures.dots(panels) if panels else ""


def _series(evidence: Evidence, titles: dict[str, str]) -> list[tuple[str, dict[str, list[figures.Points]]]]:
    """Curves at own settings by what they show, then by arm: one list of points a seed."""
    plots: dict[str, dict[str, list[figures.Points]]] = {}
    for curve in evidence.curves:
        if curve.setting != OWN or curve.name not in _PLOTTED:
            continue
        stage = "Stage II" if curve.stage == "contrast" else "Before Stage II"
        arm = titles.get(curve.arm, curve.arm)
        points = list(zip(curve.steps, curve.values, strict=True))
        none: dict[str, list[figures.Points]] = {arm.title: [] for arm in evidence.arms}  # its place is its style
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
