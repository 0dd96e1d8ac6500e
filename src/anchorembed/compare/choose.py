"""Choose Stage II's settings from the grid, by accuracy on held-out training pairs.

Each arm trains all choices with its first seed, and uses the best one for all seeds. Common settings are the primary
arm's best choice.
"""

import logging
import shutil

from anchorembed.compare.plan import Comparison
from anchorembed.compare.records import COMMON, OWN, Cost, GridScore, Run, best_choice
from anchorembed.compare.training import run_folder, train_before, train_stage_two
from anchorembed.errors import InputError
from anchorembed.train.loop import read_log

_log = logging.getLogger(__name__)


def choose(comparison: Comparison, run: Run) -> str:
    """The choice of the grid that a run has; missing trials of its arm, or of the primary arm, are trained first.

    Raises:
        InputError: if no pairs are held out to choose by.
    """
    choices = comparison.record.choices
    if len(choices) == 1:
        return choices[0]
    common = _best(comparison, comparison.settings.primary)
    return common if run.setting == COMMON else _best(comparison, run.arm, common)


def _best(comparison: Comparison, name: str, *common: str) -> str:
    """Name of an arm's best choice, after trying all; models of other choices but ``common`` are deleted."""
    arm = comparison.arm_record(name)
    trial = arm.run(OWN, arm.seeds[0])
    for choice in comparison.record.choices:
        if choice not in comparison.tried(name):
            comparison.results.keep(_try(comparison, trial, choice))
    best = best_choice(comparison.record.choices, comparison.tried(name))
    for choice_left in set(comparison.record.choices) - {best, *common}:
        shutil.rmtree(run_folder(comparison, trial) / choice_left / "contrast" / "model", ignore_errors=True)
    return best


def _try(comparison: Comparison, trial: Run, choice: str) -> GridScore:
    """Train Stage II with a choice; returns its held-out accuracy."""
    before = train_before(comparison, trial)
    _log.info("%s: trying %s", comparison.arms[trial.arm].title, choice)
    log = read_log(train_stage_two(comparison, trial, before, choice) / "log.jsonl")
    if "held_out_accuracy" not in log[-1]:
        raise InputError("data: too few pairs to hold any out, by which compare.grid chooses. Leave it out.")
    settings = comparison.recipe.contrast
    keeps_best = settings is not None and settings.keep_best
    kept = log[-1]  # of the model that was kept
    if comparison.arms[trial.arm].contrast_keys.get("keep_best", keeps_best):
        kept = max((line for line in log if "quality" in line), key=lambda line: line["quality"])
    return GridScore(trial.arm, trial.digest, trial.seed, choice, kept["held_out_accuracy"], Cost.of(log))
