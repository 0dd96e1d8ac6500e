"""The numbers of a comparison's report: scores, intervals and tests of the finished runs.

Good and bad results are reported in the same words, and missing runs are named. The p of tests that were declared
beforehand are corrected together; all other tests are called exploratory.

Axes: S seeds, Q items.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anchorembed.compare.records import OWN, ComparisonRecord
from anchorembed.compare.results import Evidence
from anchorembed.evaluate.statistics import (
    Floats,
    bootstrap_interval,
    holm,
    paired_interval,
    seeds_interval,
    sign_flip_p,
)

_LEVEL = 0.05
Key = tuple[str, str, str]  # arm, setting, collection
ItemsBySeed = dict[int, dict[str, float]]  # seed -> id of an item -> its score


@dataclass(frozen=True, slots=True)
class Score:
    """An arm's result on a collection: mean over seeds, each seed's value, and 95 % interval if items have scores."""

    mean: float
    by_seed: dict[int, float]
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Test:
    """An arm at its own settings against another arm, on the seeds that both have.

    Attributes:
        setting: of the other arm.
        difference: of the means, the arm's less the other's.
        interval: 95 % interval of the difference, by resampling seeds and items.
        seeds_interval: 95 % interval by Welch's t of the seeds' means; None with one seed.
        p: by sign flips over items.
        adjusted_p: p of a declared test, corrected for all declared tests.
    """

    arm: str
    against: str
    setting: str
    collection: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    seeds_interval: tuple[float, float] | None
    p: float
    adjusted_p: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the difference is beyond chance over queries of these trained models, by the adjusted p."""
        return self.adjusted_p is not None and self.adjusted_p < _LEVEL

    @property
    def significant_over_seeds(self) -> bool:
        """Whether the difference is beyond chance over queries and over seeds: neither interval has 0."""
        intervals = (self.interval, self.seeds_interval or (0.0, 0.0))
        return self.significant and not any(low <= 0 <= high for low, high in intervals)


@dataclass(frozen=True, slots=True)
class Analysis:
    """The numbers of the report; ``sentences`` sum up the declared tests."""

    scores: dict[Key, Score]
    metrics: dict[str, str]  # by collection
    declared: list[Test]
    exploratory: list[Test]
    sentences: list[str]


def analyse(evidence: Evidence) -> Analysis:
    """Compute every number of the report."""
    comparison = evidence.comparison
    values: dict[Key, dict[int, float]] = {}
    items: dict[Key, ItemsBySeed] = {}
    for cell in sorted(evidence.cells, key=lambda cell: cell.seed):
        key = (cell.arm, cell.setting, cell.collection)
        values.setdefault(key, {})[cell.seed] = cell.value
        items.setdefault(key, {})[cell.seed] = evidence.runs[cell.run].item_scores(cell)
    scores = {key: _score(values[key], items[key]) for key in values}
    declared: list[Test] = []
    exploratory: list[Test] = []
    for test in _tests(comparison, items):
        is_declared = test.arm == comparison.primary and test.setting == OWN and test.against in comparison.declared
        (declared if is_declared else exploratory).append(test)
    planned = dict.fromkeys(_declared_tests(comparison, scores), 1.0)  # those not run yet count with p = 1
    adjusted = holm(planned | {(test.against, test.collection): test.p for test in declared})
    declared = [replace(test, adjusted_p=adjusted[test.against, test.collection]) for test in declared]
    metrics = {cell.collection: cell.metric for cell in evidence.cells}
    sentences = [_sentence(comparison, name, declared) for name in comparison.declared]
    return Analysis(scores, metrics, declared, exploratory, sentences)


def _declared_tests(comparison: ComparisonRecord, scores: Mapping[Key, Score]) -> list[tuple[str, str]]:
    """Declared arms x collections, without collections whose metric is no mean over items and so cannot be tested."""
    testable = {collection for (_, _, collection), score in scores.items() if score.interval is not None}
    untestable = {collection for _, _, collection in scores} - testable
    declared = [arm.name for arm in comparison.arms if arm.name in comparison.declared]
    return [(arm, name) for arm in declared for name in comparison.revisions if name not in untestable]


def _score(values: dict[int, float], items: ItemsBySeed) -> Score:
    matrix_SQ = _matrix(items, values)
    interval = bootstrap_interval(matrix_SQ) if matrix_SQ is not None else None
    return Score(sum(values.values()) / len(values), values, interval)


def _matrix(items: ItemsBySeed, seeds: Iterable[int]) -> Floats | None:
    """Scores [S, Q] in order of item ids; None if there are no items, or seeds have different ones."""
    rows = [items[seed] for seed in seeds]
    ids = sorted(rows[0])
    if not ids or any(row.keys() != rows[0].keys() for row in rows):
        return None
    return np.array([[row[item_id] for item_id in ids] for row in rows])


def _tests(comparison: ComparisonRecord, items: Mapping[Key, ItemsBySeed]) -> list[Test]:
    """The primary arm against all others, then each arm of ``explore`` against its list."""
    pairs = [(comparison.primary, key) for key in items if key[0] != comparison.primary]
    for arm, others in comparison.explore.items():
        pairs += [(arm, key) for key in items if key[0] in others and key[1] == OWN]
    tests = [_test(arm, key, items) for arm, key in pairs]
    return [test for test in tests if test is not None]


def _test(arm: str, key: Key, items: Mapping[Key, ItemsBySeed]) -> Test | None:
    """An arm at its own settings against the results ``key``; None if they share no seed, or items differ."""
    against, setting, collection = key
    arm_items, other_items = items.get((arm, OWN, collection), {}), items[key]
    seeds = sorted(arm_items.keys() & other_items.keys())
    if not seeds or arm_items[seeds[0]].keys() != other_items[seeds[0]].keys():
        return None
    arm_SQ, other_SQ = _matrix(arm_items, seeds), _matrix(other_items, seeds)
    if arm_SQ is None or other_SQ is None:
        return None
    return Test(
        arm=arm,
        against=against,
        setting=setting,
        collection=collection,
        seeds=tuple(seeds),
        difference=float(arm_SQ.mean() - other_SQ.mean()),
        interval=paired_interval(arm_SQ, other_SQ),
        seeds_interval=seeds_interval(arm_SQ.mean(axis=1).tolist(), other_SQ.mean(axis=1).tolist()),
        p=sign_flip_p(_by_item(arm_SQ), _by_item(other_SQ)),
    )


def _by_item(scores_SQ: Floats) -> dict[str, list[float]]:
    return {str(number): column for number, column in enumerate(scores_SQ.T.tolist())}


def _sentence(comparison: ComparisonRecord, against: str, declared: Sequence[Test]) -> str:
    """The declared tests against one arm in words, and the collections without one."""
    tests = [test for test in declared if test.against == against]
    titles = comparison.titles
    pair = f"{titles.get(comparison.primary, comparison.primary)} against {titles.get(against, against)}"
    if not tests:
        return f"{pair}: not run."
    seeds = " or ".join(dict.fromkeys(seeds_text(test.seeds) for test in tests))
    sentences = [f"{pair} on {len(tests)} collections, {seeds}: {_higher_and_lower(tests)}."]
    significant = [test for test in tests if test.significant]
    sentences += [f"Beyond chance over queries of these models: {_higher_and_lower(significant)}."]
    if any(test.seeds_interval for test in tests):
        significant = [test for test in tests if test.significant_over_seeds]
        sentences += [f"Over other seeds, too: {_higher_and_lower(significant)}."]
    else:
        sentences += ["Over other seeds: not known from one."]
    tested = {test.collection for test in tests}
    missing = [name for name in comparison.revisions if name not in tested]
    if missing:
        sentences += [f"No test, as it was not run or has no score per item: {', '.join(missing)}."]
    return " ".join(sentences)


def _higher_and_lower(tests: Sequence[Test]) -> str:
    higher, lower = (sum(sign * test.difference > 0 for test in tests) for sign in (1, -1))
    return f"higher on {higher}, lower on {lower}"


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
