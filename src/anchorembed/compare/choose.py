"""Choose Stage II's settings from the grid, by accuracy on held-out training pairs.

Each arm trains Stage II with every choice and its first seed, and uses the best choice for all seeds. Common settings
are the primary arm's best choice.
"""

import logging
import shutil

from anchorembed.compare.arms import comparison_sections
from anchorembed.compare.plan import Comparison
from anchorembed.compare.records import COMMON, OWN, Cost, GridScore, Run, accuracy_by_choice, best_choice
from anchorembed.compare.training import run_folder, train_before, train_stage_two
from anchorembed.errors import InputError
from anchorembed.train.loop import read_log

_log = logging.getLogger(__name__)


def choose(comparison: Comparison, run: Run) -> str:
    """Name of a run's choice of the grid; missing trials of its arm and of the primary arm are trained first.

    Raises:
        InputError: if no pairs are held out to choose by.
    """
    choices = comparison.record.choices
    if len(choices) == 1:
        return choices[0]
    common = _best(comparison, comparison.settings.primary)
    return common if run.setting == COMMON else _best(comparison, run.arm, common)


def _best(comparison: Comparison, name: str, common: str = "") -> str:
    """Name of an arm's best choice, once all are tried; models of choices other than it and ``common`` are deleted."""
    arm, choices, results = comparison.arm_record(name), comparison.record.choices, comparison.results
    first_run = arm.run(OWN, arm.seeds[0])
    accuracy = accuracy_by_choice(results.grid, arm)
    for choice in choices:
        if choice not in accuracy:
            results.append(_trial(comparison, first_run, choice))
    best = best_choice(choices, accuracy_by_choice(results.grid, arm))
    for unused_choice in set(choices) - {best, common}:
        shutil.rmtree(run_folder(comparison, first_run) / unused_choice / "contrast" / "model", ignore_errors=True)
    return best


def _trial(comparison: Comparison, run: Run, choice: str) -> GridScore:
    """Train Stage II of a run with a choice; returns the held-out accuracy of the model that training keeps."""
    before = train_before(comparison, run)
    _log.info("%s: trying %s", comparison.arms[run.arm].title, choice)
    log = read_log(train_stage_two(comparison, run, before, choice) / "log.jsonl")
    if "held_out_accuracy" not in log[-1]:
        raise InputError(
            "compare.grid: too few pairs to hold any out, by which it chooses. Add pairs, or leave it out."
        )
    _, _, contrast = comparison_sections(comparison.recipe)
    kept = log[-1]
    if comparison.arms[run.arm].contrast_keys.get("keep_best", contrast.keep_best):
        evaluated = [line for line in log if "quality" in line]  # none if no quality is defined: the last step is kept
        kept = max(evaluated, key=lambda line: line["quality"], default=log[-1])
    return GridScore(run.arm, run.digest, run.seed, choice, kept["held_out_accuracy"], Cost.of(log))
