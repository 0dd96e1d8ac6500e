"""The contents of a results folder, as typed records.

A line of ``results.jsonl`` is a `Cell` or a `GridScore`, a file in ``results/`` a `RunRecord`, and
``comparison.json`` the `ComparisonRecord`.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from anchorembed.evaluate.isotropy import Isotropy

T = TypeVar("T")
NonEmpty = Annotated[list[T], Field(min_length=1)]
Setting = Literal["own", "common"]

# Where a run's Stage II settings come from: the best choice of its own arm, or that of the primary arm.
OWN: Setting = "own"
COMMON: Setting = "common"


def parse(kind: type[T], values: object) -> T:
    """A record from parsed JSON; keys without a field are ignored.

    Raises ValueError naming the first key that is missing or has a value of another type.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


@dataclass(frozen=True, slots=True)
class Run:
    """A model to evaluate: its arm, a hash of the arm's settings, own or common Stage II settings, and seed."""

    arm: str
    digest: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Name in file names and messages."""
        return f"{self.arm}-{self.digest}-{self.setting}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A run's score on a collection; ``revision`` is a hash of the collection's data."""

    arm: str
    digest: str
    setting: Setting
    seed: int
    choice: str  # of the grid, by name
    collection: str
    revision: str
    metric: str
    value: float

    @property
    def run(self) -> Run:
        """The run that has this score."""
        return Run(self.arm, self.digest, self.setting, self.seed)

    @property
    def identity(self) -> Hashable:
        """A key that differs for all cells of a comparison."""
        return self.run, self.collection


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a stage: seconds, own tokens of its texts, model FLOPs, peak memory in GB."""

    seconds: float
    tokens: int = 0
    flops: float = 0.0
    peak_gb: float = 0.0

    @classmethod
    def of(cls, log: Sequence[Mapping[str, float]]) -> Self:
        """The cost of a training, from its log."""
        seconds, tokens, flops = (sum(line[name] for line in log) for name in ("seconds", "tokens", "flops"))
        return cls(seconds, int(tokens), flops, max(line["peak_gb"] for line in log))


@dataclass(frozen=True, slots=True)
class GridScore:
    """Held-out accuracy of an arm with one choice of the grid."""

    arm: str
    digest: str
    seed: int
    choice: str
    accuracy: float
    cost: Cost

    @property
    def identity(self) -> Hashable:
        """A key that differs for all grid scores of a comparison."""
        return self.arm, self.digest, self.seed, self.choice


@dataclass(frozen=True, slots=True)
class ItemScores:
    """Scores of a collection's queries or items, by id, on the data ``revision``; empty if the metric has none."""

    revision: str
    scores: dict[str, float]

    @classmethod
    def of(cls, revision: str, items: Mapping[str, float]) -> Self:
        """Scores rounded to six significant digits, more than a report shows, so that records are small to copy."""
        return cls(revision, {item: float(f"{score:.6g}") for item, score in items.items()})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Results of a run besides its cells.

    Attributes:
        costs: by stage; ``evaluate`` is all collections together.
        curves: by stage: metrics by name, with ``step``.
        isotropy: of held-out pairs, by model: before or after Stage II.
        made_with: versions of packages, threads, number format of matrix products, by name.
        items: by collection.
    """

    costs: dict[str, Cost] = field(default_factory=dict)
    curves: dict[str, list[dict[str, int | float]]] = field(default_factory=dict)
    isotropy: dict[str, Isotropy] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    items: dict[str, ItemScores] = field(default_factory=dict)

    def item_scores(self, cell: Cell) -> dict[str, float]:
        """Scores of a cell's items; empty if the stored ones are of other data."""
        items = self.items.get(cell.collection)
        return items.scores if items is not None and items.revision == cell.revision else {}


@dataclass(frozen=True, slots=True)
class ArmRecord:
    """An arm: ``what`` describes it in a sentence, ``settings`` are those that it does not share with other arms.

    ``steps`` are trained before Stage II, or in addition to Stage II's if the arm is ``longer``. They cost ``budget``
    times the primary arm's Stage I.
    """

    name: str
    title: str
    what: str
    digest: str
    trained: bool
    longer: bool
    seeds: NonEmpty[int]
    steps: int
    settings: dict[str, str]
    budget: float = 1.0

    def run(self, setting: Setting, seed: int) -> Run:
        """The arm's run with a setting and a seed."""
        return Run(self.name, self.digest, setting, seed)


@dataclass(frozen=True, slots=True)
class ComparisonRecord:
    """A comparison: its arms and collections, the tests declared beforehand, and how to repeat it.

    ``key`` is a hash of all that decides results. ``tables`` has the collections of each table of the report.
    """

    key: str
    title: str
    recipe: str  # YAML
    command: str
    arms: NonEmpty[ArmRecord]
    primary: str
    declared: list[str]
    explore: dict[str, list[str]]  # arm -> arms that exploratory tests compare it with
    choices: NonEmpty[str]  # of the grid, by name
    notes: list[str]
    tables: dict[str, dict[str, str]]  # title -> collection -> hash of its data

    @property
    def revisions(self) -> dict[str, str]:
        """The hash of each collection's data."""
        return {name: revision for table in self.tables.values() for name, revision in table.items()}

    @property
    def titles(self) -> dict[str, str]:
        """Titles of arms by name."""
        return {arm.name: arm.title for arm in self.arms}

    def runs(self) -> Iterator[Run]:
        """All runs, every arm's first seed before any second; common settings are run with the first seed only."""
        for number in range(max(len(arm.seeds) for arm in self.arms)):
            for arm in self.arms:
                if number < len(arm.seeds):
                    yield arm.run(OWN, arm.seeds[number])
                if number == 0 and arm.trained and arm.name != self.primary and len(self.choices) > 1:
                    yield arm.run(COMMON, arm.seeds[0])


def accuracy_by_choice(grid: Sequence[GridScore], arm: ArmRecord) -> dict[str, float]:
    """Held-out accuracy of each choice of the grid that an arm has tried, with its first seed."""
    identity = (arm.name, arm.digest, arm.seeds[0])
    return {score.choice: score.accuracy for score in grid if (score.arm, score.digest, score.seed) == identity}


def best_choice(choices: Sequence[str], accuracy: Mapping[str, float]) -> str:
    """The choice with the highest accuracy, the first of equal ones; all must be tried."""
    return max(choices, key=accuracy.__getitem__)
