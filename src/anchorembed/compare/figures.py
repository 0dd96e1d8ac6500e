"""Figures of a report as SVG: readable without colour, by marker and dash, and the same bytes for the same numbers."""

import io
import math
from collections.abc import Sequence
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # step, value
Row = tuple[str, float, list[float], tuple[float, float] | None]  # arm, mean, seeds, interval

_MARKERS = "osD^vPX*<>p"  # more than dashes by one, so that the two together repeat late
_DASHES = [
    "-",
    "--",
    ":",
    "-.",
    *((0, dashes) for dashes in ((5, 1), (1, 3), (3, 1, 1, 1), (8, 3), (2, 2), (6, 2, 2, 2))),
]
_COLUMNS = 2
_MANY = 60  # points of a line from which it has no markers


def dots(panels: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """A panel for each collection with a row for each arm: mean, seeds and interval."""
    rows = math.ceil(len(panels) / _COLUMNS)
    longest = max(len(arms) for _, arms in panels)
    figure = Figure(figsize=(11, rows * (0.32 * longest + 0.9)), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis, (title, arms) in zip(axes, panels, strict=False):
        for height, (_, mean, seeds, interval) in enumerate(arms):
            if interval:
                axis.plot(interval, [height, height], color="0.4", linewidth=2)
            axis.plot(seeds, [height] * len(seeds), "o", color="0.2", fillstyle="none")
            axis.plot([mean], [height], "o", color="black")
        axis.set_yticks(range(len(arms)), [name for name, *_ in arms])
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="x", color="0.85")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return _svg(figure)


def lines(title: str, series: dict[str, list[Points]]) -> str:
    """A line for each arm and seed; an arm's seeds share marker, dash and colour, by its position in ``series``."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, runs) in enumerate(series.items()):
        for seed, points in enumerate(runs):
            axis.plot(
                [step for step, _ in points],
                [value for _, value in points],
                marker=_MARKERS[number % len(_MARKERS)] if len(points) < _MANY else "",
                linestyle=_DASHES[number % len(_DASHES)],
                color=f"C{number}",
                linewidth=1.2,
                markersize=4,
                label=name if seed == 0 else None,
            )
    axis.set_xlabel("step")
    axis.set_ylabel(title.rsplit(": ", maxsplit=1)[-1], wrap=True)
    axis.grid(color="0.9")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=4, frameon=False)
    return _svg(figure)


def by_compute(series: dict[str, list[tuple[float, list[float]]]]) -> str:
    """Quality against compute: a line for each arm of PFLOPs and the seeds' quality, with its mean and range."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        means = [fmean(seeds) for _, seeds in points]
        ranges = [[mean - min(seeds), max(seeds) - mean] for mean, (_, seeds) in zip(means, points, strict=True)]
        axis.errorbar(
            [flops for flops, _ in points],
            means,
            list(zip(*ranges, strict=True)),
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_DASHES[number % len(_DASHES)],
            color=f"C{number}",
            linewidth=1.2,
            markersize=5,
            capsize=3,
            label=name,
        )
    axis.set_xlabel("training, model PFLOPs")
    axis.set_ylabel("mean of all collections")
    axis.grid(color="0.9")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=4, frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element, with text as text, and neither date nor random names in it."""
    sink = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anchorembed"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
