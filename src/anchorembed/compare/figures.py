"""Figures of a report as SVG: readable without colour, by marker and dash, and the same bytes for the same numbers."""

import io
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # step, value
Row = tuple[str, float, list[float], tuple[float, float] | None]  # arm, mean, seeds, interval

_MARKERS = "osD^vPX*<>p"  # one more than there are dashes, so that few lines have both in common
_DASHES: list[Any] = ["-", "--", ":", "-."]
_DASHES += [(0, dashes) for dashes in ((5, 1), (1, 3), (3, 1, 1, 1), (8, 3), (2, 2), (6, 2, 2, 2))]
_COLUMNS = 2
_MAX_MARKED = 60  # a line of as many points or more has no markers


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
    """A line for each arm and seed; an arm's seeds share marker, dash and colour, by its position in ``series``.

    ``title`` ends with the label of the y axis, after a colon.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, runs) in enumerate(series.items()):
        for run_number, points in enumerate(runs):
            style = _style(number) if len(points) < _MAX_MARKED else _style(number) | {"marker": ""}
            steps, values = [step for step, _ in points], [value for _, value in points]
            axis.plot(steps, values, **style, markersize=4, label=name if run_number == 0 else None)
    return _labelled_svg(figure, axis, "step", title.rsplit(": ", maxsplit=1)[-1])


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
            **_style(number),
            markersize=5,
            capsize=3,
            label=name,
        )
    return _labelled_svg(figure, axis, "training, model PFLOPs", "mean of all collections")


def _style(number: int) -> dict[str, Any]:
    """Marker, dash and colour of the line of this number."""
    marker, dash = _MARKERS[number % len(_MARKERS)], _DASHES[number % len(_DASHES)]
    return {"marker": marker, "linestyle": dash, "color": f"C{number}", "linewidth": 1.2}


def _labelled_svg(figure: Figure, axis: Axes, x_label: str, y_label: str) -> str:
    """The figure of an axis as SVG, with labels, a grid, and a legend beside it."""
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label, wrap=True)
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
