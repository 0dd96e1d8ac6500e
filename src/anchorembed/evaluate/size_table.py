"""Size against quality: a table for each task, with a row for each format of stored vectors."""

import math

from anchorembed.evaluate.tasks import TaskScore


def title(score: TaskScore) -> str:
    """The task, and the header of its table."""
    head = f"{'dimensions':>10}  {'precision':<9}{'bytes':>8}{'size':>9}{score.metric:>12}{'of full':>9}"
    return f"{score.task}: {score.kind}\n{head}"


def row(score: TaskScore, full: TaskScore) -> str:
    """The row of a score: size of a vector and metric, each also as a share of the full vectors'."""
    form = score.form
    value = "undefined" if math.isnan(score.value) else f"{score.value:.4f}"
    share = f"{score.value / full.value:.1%}" if full.value > 0 and not math.isnan(score.value) else "-"
    size = f"{form.bytes / full.form.bytes:.1%}"
    return f"{form.dimensions:>10}  {form.precision:<9}{form.bytes:>8}{size:>9}{value:>12}{share:>9}"
