"""The progress bar: done, rate, time left and a note, on standard error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from anchorembed.system.processes import first_process

SHOWN = ("loss", "gain_q2d", "gain_d2q", "gain_bag_q2d", "gain_bag_d2q", "held_out_accuracy")  # while training
_LONG_BAR_COLUMNS = 120  # of a terminal, from which the bar is longer
_UNBROKEN_COLUMNS = 1000  # where standard error is no terminal, so that no line is broken


class _Rate(ProgressColumn):
    """Items a second, or below one a second, seconds for each item."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("-", style="progress.data.speed")
        text = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
        return Text(text, style="progress.data.speed")


class _Done(MofNCompleteColumn):
    """Items done, of all if their number is known."""

    def render(self, task: Task) -> Text:
        return Text(str(int(task.completed))) if task.total is None else super().render(task)


_TERMINAL_ONLY = ContextVar("terminal_only", default=False)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Show bars on terminals only, within the block: for verbs that log their progress line by line."""
    token = _TERMINAL_ONLY.set(True)
    try:
        yield
    finally:
        _TERMINAL_ONLY.reset(token)


def progress_bar() -> Progress:
    """A progress bar, shown by the first process only; its tasks need a field ``note``.

    Where standard error is no terminal, one line is printed at the end. Long notes wrap. Names and notes are plain
    text, not rich's markup.
    """
    console = Console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(overflow="fold"))
    columns = [
        name,
        BarColumn(20 if console.width >= _LONG_BAR_COLUMNS else 8),
        _Done(),
        _Rate(),
        TimeRemainingColumn(),
        note,
    ]
    if not console.is_terminal:
        console, columns = Console(stderr=True, width=_UNBROKEN_COLUMNS), [name, _Done(), note]
    hidden = _TERMINAL_ONLY.get() and not console.is_terminal
    return Progress(*columns, console=console, speed_estimate_period=120, disable=hidden or not first_process())


@contextmanager
def counting_bar(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar of ``total`` texts or pairs, shown from its first call on."""
    bar = progress_bar()

    def advance(done: int) -> None:
        bar.start()
        bar.advance(bar.tasks[0].id if bar.tasks else bar.add_task(name, total=total, note=""), done)

    try:
        yield advance
    finally:
        if bar.tasks:  # else it ends with an empty line
            bar.stop()


def metrics_note(metrics: Mapping[str, float]) -> str:
    """The metrics in `SHOWN`, as the progress bar of training shows them."""
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
