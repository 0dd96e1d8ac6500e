"""The numbers of a comparison's report: scores, intervals and tests of what is finished.

Bad news is said in the same words as good news, what was not run is said to be missing, and only tests that were
declared beforehand are corrected together and called tests; anything else is called exploratory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from anchorembed.compare.results import OWN
from anchorembed.compare.statistics import bootstrap_interval, holm, paired_interval, seeds_interval, sign_flip_p

_LEVEL = 0.05
Key = tuple[str, str, str]  # arm, setting, collection


@dataclass(frozen=True, slots=True)
class ArmShown:
    """One arm: its name, title, what it is in a sentence, and its settings."""

    name: str
    title: str
    what: str
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage cost: seconds, own tokens of its texts, model FLOPs, peak memory."""

    seconds: float
    tokens: int
    flops: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class Cell:
    """A result: ``per_item`` holds each query's or item's score, empty where the value is no mean over items."""

    arm: str
    setting: str
    seed: int
    collection: str
    metric: str
    value: float
    per_item: dict[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps of a stage."""

    arm: str
    setting: str
    seed: int
    stage: str
    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a report is made from."""

    title: str
    arms: list[ArmShown]
    cells: list[Cell]
    costs: dict[tuple[str, str, int], dict[str, Cost]]
    curves: list[Curve]
    isotropy: list[tuple[str, str, int, str, dict[str, float]]]
    primary: str
    declared: list[str]
    explore: dict[str, list[str]]  # arms -> those each is tested against, too
    notes: list[str]
    recipe: str
    command: str
    made_with: list[str]  # what computed it: versions, threads, number format; several if machines differed
    tables: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Score:
    """An arm's result on a collection: mean over seeds, each seed's value, 95 % interval where items allow one."""

    mean: float
    seeds: dict[int, float]
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Test:
    """An arm, at its own settings, against another, on the seeds that both have; p is adjusted if it was declared.

    ``interval`` resamples seeds and queries, ``over_seeds`` is Welch's t of the seeds' means, None with one seed.
    """

    arm: str
    against: str
    setting: str
    collection: str
    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    over_seeds: tuple[float, float] | None
    p: float
    adjusted: float | None = None

    @property
    def sure(self) -> bool:
        """Beyond chance over queries of these trained models: by the adjusted p."""
        return self.adjusted is not None and self.adjusted < _LEVEL

    @property
    def sure_over_seeds(self) -> bool:
        """Beyond chance over queries, and over seeds, too: neither interval has 0."""
        return self.sure and self.over_seeds is not None and not any(map(_has_zero, (self.interval, self.over_seeds)))


@dataclass(frozen=True, slots=True)
class Analysis:
    """The numbers of the report."""

    scores: dict[Key, Score]
    metrics: dict[str, str]
    declared: list[Test]
    exploratory: list[Test]
    sentences: list[str] = field(default_factory=list)


def analyse(evidence: Evidence) -> Analysis:
    """Compute every number of the report."""
    groups: dict[Key, list[Cell]] = {}
    for cell in evidence.cells:
        groups.setdefault((cell.arm, cell.setting, cell.collection), []).append(cell)
    scores = {key: _score(cells) for key, cells in groups.items()}
    tests = list(_tests(evidence, groups))
    declared = [test for test in tests if _declared(evidence, test)]
    family = dict.fromkeys(_family(evidence, scores), 1.0)  # a test that was not run yet counts as one, too
    adjusted = holm(family | {(test.against, test.collection): test.p for test in declared})
    declared = [replace(test, adjusted=adjusted[test.against, test.collection]) for test in declared]
    others = [test for test in tests if not _declared(evidence, test)]
    metrics = {cell.collection: cell.metric for cell in evidence.cells}
    sentences = [_sentence(evidence, name, declared, _missing(evidence, name, declared)) for name in evidence.declared]
    return Analysis(scores, metrics, declared, others, sentences)


def _declared(evidence: Evidence, test: Test) -> bool:
    return test.arm == evidence.primary and test.setting == OWN and test.against in evidence.declared


def _family(evidence: Evidence, scores: dict[Key, Score]) -> list[tuple[str, str]]:
    """Declared arms x collections, but for metrics that are no mean over items and cannot be tested."""
    testable = {collection for (_, _, collection), score in scores.items() if score.interval is not None}
    untested = {collection for _, _, collection in scores} - testable
    names = [name for names in evidence.tables.values() for name in names if name not in untested]
    arms = {arm.name for arm in evidence.arms}
    return [(arm, name) for arm in evidence.declared if arm in arms for name in names]


def _missing(evidence: Evidence, against: str, declared: Sequence[Test]) -> list[str]:
    tested = {test.collection for test in declared if test.against == against}
    return [name for names in evidence.tables.values() for name in names if name not in tested]


def _score(cells: Sequence[Cell]) -> Score:
    seeds = {cell.seed: cell.value for cell in sorted(cells, key=lambda cell: cell.seed)}
    matrix = _matrix(cells)
    interval = bootstrap_interval(matrix) if matrix is not None else None
    return Score(sum(seeds.values()) / len(seeds), seeds, interval)


def _matrix(cells: Sequence[Cell]) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]] | None":
    """Scores [seeds, items], items in the order of their ids; None where there are none, or seeds differ in items."""
    items = sorted(cells[0].per_item)
    if not items or any(sorted(cell.per_item) != items for cell in cells):
        return None
    return np.array([[cell.per_item[item] for item in items] for cell in cells])


def _tests(evidence: Evidence, groups: dict[Key, list[Cell]]) -> Iterable[Test]:
    """The primary arm against all others, then those that are explored against the ones named."""
    for key, cells in groups.items():
        if key[0] != evidence.primary:
            yield from _test(evidence.primary, key, cells, groups)
    for arm, others in evidence.explore.items():
        for key, cells in groups.items():
            if key[0] in others and key[1] == OWN:
                yield from _test(arm, key, cells, groups)


def _test(arm: str, key: Key, second_cells: list[Cell], groups: dict[Key, list[Cell]]) -> Iterable[Test]:
    """An arm at its own settings against the cells of ``key``; none where they share no seed, or items differ."""
    against, setting, collection = key
    first_cells = groups.get((arm, OWN, collection), [])
    seeds = sorted({cell.seed for cell in first_cells} & {cell.seed for cell in second_cells})
    if not seeds:
        return
    first_cells, second_cells = (
        [cell for cell in cells if cell.seed in seeds] for cells in (first_cells, second_cells)
    )
    first, second = _matrix(first_cells), _matrix(second_cells)
    if first is not None and second is not None and sorted(first_cells[0].per_item) == sorted(second_cells[0].per_item):
        yield Test(
            arm=arm,
            against=against,
            setting=setting,
            collection=collection,
            seeds=tuple(seeds),
            difference=float(first.mean() - second.mean()),
            interval=paired_interval(first, second),
            over_seeds=seeds_interval(first.mean(axis=1).tolist(), second.mean(axis=1).tolist()),
            p=sign_flip_p(_by_item(first), _by_item(second)),
        )


def _has_zero(interval: tuple[float, float]) -> bool:
    low, high = interval
    return low <= 0 <= high


def _by_item(scores_SQ: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> dict[str, list[float]]:
    return {str(number): column for number, column in enumerate(scores_SQ.T.tolist())}


def _sentence(evidence: Evidence, against: str, declared: Sequence[Test], missing: Sequence[str]) -> str:
    """What the declared tests against one arm say in words, and on which collections there is none."""
    titles = {arm.name: arm.title for arm in evidence.arms}
    tests = [test for test in declared if test.against == against]
    first, second = titles.get(evidence.primary, evidence.primary), titles.get(against, against)
    if not tests:
        return f"{first} against {second}: not run."
    seeds = " or ".join(dict.fromkeys(seeds_text(test.seeds) for test in tests))
    told = [f"{first} against {second} on {len(tests)} collections, {seeds}: {_counted(tests)}."]
    told += [f"Beyond chance over queries of these models: {_counted([test for test in tests if test.sure])}."]
    if any(test.over_seeds for test in tests):
        told += [f"Over other seeds, too: {_counted([test for test in tests if test.sure_over_seeds])}."]
    else:
        told += ["Over other seeds: not known from one."]
    told += [f"No test, as it was not run or has no score per item: {', '.join(missing)}."] if missing else []
    return " ".join(told)


def _counted(tests: Sequence[Test]) -> str:
    higher, lower = (sum(sign * test.difference > 0 for test in tests) for sign in (1, -1))
    return f"higher on {higher}, lower on {lower}"


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
