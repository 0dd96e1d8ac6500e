"""The progress bar: done, rate, time left and a note, on standard error."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from anchorembed.system.processes import first_process

SHOWN = ("loss", "gain_q2d", "gain_d2q", "gain_bag_q2d", "gain_bag_d2q", "held_out_accuracy")  # while training


class _Rate(ProgressColumn):
    """Items a second, or seconds an item where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("-", style="progress.data.speed")
        text = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
        return Text(text, style="progress.data.speed")


def progress_bar() -> Progress:
    """A progress bar, shown by the first process alone; its tasks need a field ``note``. No name is markup."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        speed_estimate_period=120,
        disable=not first_process(),
    )


def metrics_note(metrics: Mapping[str, float]) -> str:
    """What the bar of training shows beside steps, rate and time left: those of the metrics that are in `SHOWN`."""
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
