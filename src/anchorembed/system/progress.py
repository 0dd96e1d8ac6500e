"""The progress bar: done, rate, time left and a note, on standard error."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from anchorembed.system.processes import first_process

SHOWN = ("loss", "gain_q2d", "gain_d2q", "gain_bag_q2d", "gain_bag_d2q", "held_out_accuracy")  # while training
_ROOMY = 120  # columns of a terminal from which the bar is longer
_WIDE = 1000  # columns of what is no terminal: a line is never broken


class _Rate(ProgressColumn):
    """Items a second, or seconds an item where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("-", style="progress.data.speed")
        text = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
        return Text(text, style="progress.data.speed")


_TERMINAL_ONLY = ContextVar("terminal_only", default=False)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Within, what is no terminal gets no bars: for verbs that say in lines of their own what is done."""
    token = _TERMINAL_ONLY.set(True)
    try:
        yield
    finally:
        _TERMINAL_ONLY.reset(token)


def progress_bar() -> Progress:
    """A progress bar, shown by the first process alone; its tasks need a field ``note``. No name is markup.

    What is no terminal gets one line at the end. A note that has no room goes on in the next line.
    """
    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(overflow="fold"))
    columns = [
        name,
        BarColumn(20 if console.width >= _ROOMY else 8),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        note,
    ]
    if not console.is_terminal:
        console, columns = Console(stderr=True, width=_WIDE), [name, MofNCompleteColumn(), note]
    hidden = _TERMINAL_ONLY.get() and not console.is_terminal
    return Progress(*columns, console=console, speed_estimate_period=120, disable=hidden or not first_process())


def metrics_note(metrics: Mapping[str, float]) -> str:
    """What the bar of training shows beside steps, rate and time left: those of the metrics that are in `SHOWN`."""
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
