"""Learning curves from the logs of runs. `drawings` draws them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from anchorembed.train.loop import read_log

Points = list[tuple[float, float]]
_CHARTS = {  # title: stage, and the name of each curve's metric
    "Stage II: loss": ("contrast", {"loss": ""}),
    "Stage II: accuracy on held-out pairs": ("contrast", {"held_out_accuracy": ""}),
    "Stage I: loss, nats a token": ("reconstruct", {"loss": ""}),
    "Stage I: how much the decoder reads of a vector (anchor gain), nats a token": (
        "reconstruct",
        {"gain_q2d": "document from its query", "gain_d2q": "query from its document"},
    ),
}


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over steps by name."""

    title: str
    curves: dict[str, Points]


def learning_curves(logs: Mapping[str, Path]) -> Iterator[Chart]:
    """Learning curves of runs, by the name of what each trained; charts without a curve are left out."""
    for title, (stage, metrics) in _CHARTS.items():
        curves: dict[str, Points] = {}
        for name, folder in logs.items():
            log = read_log(folder / stage / "log.jsonl")
            for metric, label in metrics.items():
                points = [(entry["step"], entry[metric]) for entry in log if metric in entry]
                curves |= {": ".join(filter(None, (name, label))): points} if points else {}
        if curves:
            yield Chart(title, curves)
