"""The sizes of a run of a given time (`time_budget`), fitted again after each arm and kept in a file."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from anchorembed.errors import InputError, first_line
from anchorembed.system.files import to_json, write_file
from anchorembed.train.loop import read_log
from anchorembed.train.time_budget import Sizes, Times, corrected, minutes_for, refitted, seconds_left

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The sizes of a run of ``asked`` minutes after ``arms`` of its two arms.

    Attributes:
        asked: minutes of the whole run.
        sizes: those of trained arms, and those planned for the rest.
        times: measured before training, then corrected by each arm.
        most: largest useful sizes.
        begun: seconds spent before training.
        spent: seconds spent when the sizes were fitted.
        arms: arms trained when the sizes were fitted.
    """

    asked: float
    sizes: Sizes
    times: Times
    most: Sizes
    begun: float
    spent: float
    arms: int = 0

    @property
    def minutes(self) -> float:
        """Estimated minutes of the whole run."""
        return (self.spent + seconds_left(self.sizes, self.times, self.arms)) / 60

    def minutes_for(self, contrast_steps: int) -> int:
        """Minutes of a run with ``contrast_steps`` steps of Stage II."""
        return minutes_for(contrast_steps, self.begun, self.times, self.most)


class Clock:
    """Fits a run's sizes again after each arm and keeps them in a file; time between two commands does not count."""

    def __init__(self, path: Path, sizing: Sizing, started: float) -> None:
        self.path, self.sizing, self.started = path, sizing, started

    def write(self) -> None:
        """Keep the sizing."""
        write_file(self.path, to_json(asdict(self.sizing), indent=2) + "\n")

    def arm_done(self, arms: int, contrast_log: Path) -> Sizes:
        """The sizes after ``arms`` trained arms, by the log of the last one's Stage II and the time spent."""
        before = self.sizing
        if arms > before.arms:
            spent = time.monotonic() - self.started
            times = corrected(before.times, before.sizes.contrast_steps, read_log(contrast_log))
            sizes = refitted(60 * before.asked - spent, times, before.sizes, before.most, arms)
            self.sizing = replace(before, sizes=sizes, times=times, spent=spent, arms=arms)
            self.write()
            left = before.asked - spent / 60
            fitted = (
                f"{sizes.reconstruct_steps} steps of Stage I"
                if arms == 1
                else f"measured on {sizes.documents} documents"
            )
            _log.info(f"sizes: {left:.1f} minutes are left: {fitted}; about {self.sizing.minutes:.0f} minutes in all")
        return self.sizing.sizes


def read_sizing(path: Path) -> Sizing:
    """Read the file that a `Clock` has written; raises InputError if it is damaged."""
    try:
        return TypeAdapter(Sizing).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, or of another version ({first_line(error)}). Delete its folder, or choose another: "
            "--set output=DIR"
        ) from error
