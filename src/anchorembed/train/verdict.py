"""Whether training helped on the user's own data: the trained model against the model before it and against BM25.

The tests are held-out pairs, as a small retrieval test, and the tasks of ``evaluate_on``. Scores are cached in the
output folder by a hash of all that decides them, so a repeated run gives the same verdict.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorembed.curate.mine import by_bm25
from anchorembed.data.pairs import TextPair
from anchorembed.data.split import split
from anchorembed.errors import InputError, extra
from anchorembed.evaluate.difference import FEWEST, Difference, difference
from anchorembed.evaluate.held_out import (
    METRIC,
    Instruction,
    PairSearch,
    pair_search,
    search_by_embedder,
    search_by_words,
)
from anchorembed.export.card import RESULTS, write_card
from anchorembed.model.load import load_config
from anchorembed.recipe_schema import Recipe
from anchorembed.system.files import hash_texts, to_json, write_file
from anchorembed.train.prepare import load_to_measure, open_pairs
from anchorembed.train.resume_plan import model_content

if TYPE_CHECKING:  # tasks need an extra, which is imported only if a recipe has tasks
    from anchorembed.evaluate.tasks import Task

_log = logging.getLogger(__name__)

VERDICT = "verdict.json"
HELD_OUT = "held-out pairs"
_MOST_PAIRS = 1000  # in the test; time grows with their square
_ENOUGH = f"{10 * FEWEST} pairs or more"
_MORE_PAIRS = (
    "Bring {} (held out are at most a tenth of all and at most data.held_out), or name tests in contrast.evaluate_on."
)
Measured = dict[str, dict[str, Any]]  # test -> its metric, its value, and the score of each of its items


@dataclass(frozen=True, slots=True)
class Tests:
    """The tests of a recipe's models; ``pairs`` is None if fewer than two are held out."""

    pairs: PairSearch | None
    tasks: "Sequence[Task]"

    @property
    def digest(self) -> str:
        """Hash of all texts and judgements."""
        return hash_texts([self.pairs.digest if self.pairs else "", *(f" {t.name} {t.revision}" for t in self.tasks)])


@dataclass(frozen=True, slots=True)
class TestVerdict:
    """A test's scores and the trained model's differences; None if not measured, or if items have no scores."""

    test: str
    metric: str
    items: int
    trained: float
    before: float
    bm25: float | None
    against_before: Difference | None
    against_bm25: Difference | None


def conclude(recipe: Recipe, trained: Path) -> list[TestVerdict]:
    """Measure the model before training, the trained one, and BM25; log the verdicts and write ``verdict.json``."""
    tests = find_tests(recipe)
    before = recipe.model_before
    cache = recipe.output / "verdict"
    settings = recipe.model.model_dump_json(exclude={"name", "device"})
    settings += recipe.data.model_dump_json(exclude={"sources"})

    def by_model(name: str, model: str) -> Measured:
        key = hash_texts([f"{tests.digest} {settings} {model_content(model)}"])
        return _cached(cache / f"{name}.json", key, lambda: _by_model(tests, recipe, model))

    scores = {"before": by_model("before", before), "trained": by_model("trained", str(trained))}
    missing = ""
    try:
        scores["bm25"] = _cached(cache / "bm25.json", tests.digest, lambda: _by_bm25(tests))
    except InputError as error:
        missing = f"BM25 is left out. {error}"
    verdicts = [_verdict(test, scores) for test in scores["trained"]]
    record = {"model": str(trained), "before": before, "tests": [_record(each) for each in verdicts]}
    write_file(recipe.output / VERDICT, to_json(record, indent=2) + "\n")
    _put_on_card(trained, verdicts)
    for line in [*verdict_lines(verdicts), *([missing] if missing and verdicts else [])]:
        _log.info("%s", line)
    return verdicts


def find_tests(recipe: Recipe) -> Tests:
    """A recipe's held-out pairs, and the tasks that its stages are evaluated on."""
    pairs = held_out_pairs(recipe)
    names = [name for stage in (recipe.reconstruct, recipe.contrast) if stage for name in stage.evaluate_on]
    tasks: Sequence[Task] = ()
    if names:
        with extra("eval"):
            from anchorembed.evaluate.find import find_tasks  # noqa: PLC0415 - an extra

        tasks = find_tasks(list(dict.fromkeys(names)))
    return Tests(pair_search(pairs) if len(pairs) > 1 else None, tasks)


def held_out_pairs(recipe: Recipe) -> list[tuple[TextPair, Instruction]]:
    """A recipe's held-out pairs, at most 1,000 of them, each with the instruction of its source."""
    store = open_pairs(recipe)
    pairs = []
    for index in split(store, recipe.data.held_out, recipe.seed).held_out_sample(_MOST_PAIRS).tolist():
        source = store.sources[store.source_of(index)]
        pairs.append((store[index], (source.instruction, source.symmetric)))
    return pairs


def verdict_lines(verdicts: Sequence[TestVerdict]) -> list[str]:
    """The verdicts as lines of text."""
    if not verdicts:
        return [
            "verdict: whether training helped is not known, as fewer than 2 pairs are held out. To tell a "
            f"difference takes {FEWEST} queries or more. {_MORE_PAIRS.format(_ENOUGH)}"
        ]
    return [line for verdict in verdicts for line in _lines(verdict)]


def _lines(verdict: TestVerdict) -> list[str]:
    bm25 = "" if verdict.bm25 is None else f", {verdict.bm25:.3f} by BM25"
    test = f"{verdict.test}, {verdict.items} queries or texts" if verdict.items else verdict.test
    if verdict.test == HELD_OUT:
        test = f"{verdict.items} {verdict.test}"
    lines = [
        f"verdict on {test}, {verdict.metric}: {verdict.before:.3f} before training, {verdict.trained:.3f} after{bm25}"
    ]
    is_told = True
    for name, against in (("before training", verdict.against_before), ("BM25", verdict.against_bm25)):
        if against is not None and against.word == "cannot be told":
            is_told = False
            lines.append(f"  whether it is better than {name} cannot be told: {against}")
        elif against is not None:
            lines.append(f"  {against.word} than {name}: {against}")
    if not is_told:
        lines.append(f"  {_too_few(verdict)}")
    if verdict.against_before is None:
        lines.append("  whether that is more than chance cannot be told: this metric has no score of each item")
    return lines


def _too_few(verdict: TestVerdict) -> str:
    """Why a difference cannot be told, and what to do."""
    counted, cure = f"{verdict.items} queries or texts are in this test", "Name a larger test in contrast.evaluate_on."
    if verdict.test == HELD_OUT:
        counted = f"{verdict.items} queries were held out"
        cure = _MORE_PAIRS.format(_ENOUGH if verdict.items < FEWEST else "more pairs")
    return f"{counted}; any difference takes {FEWEST} or more to tell, a small one hundreds. {cure}"


def _verdict(test: str, scores: Mapping[str, Measured]) -> TestVerdict:
    trained, before, bm25 = scores["trained"][test], scores["before"][test], scores.get("bm25", {}).get(test)
    return TestVerdict(
        test,
        trained["metric"],
        len(trained["items"]),
        _number(trained["value"]),
        _number(before["value"]),
        None if bm25 is None else bm25["value"],
        _difference(trained, before),
        _difference(trained, bm25),
    )


def _difference(trained: Mapping[str, Any], other: Mapping[str, Any] | None) -> Difference | None:
    """The difference of two models; None without scores of the same items."""
    if not other or not trained["items"] or trained["items"].keys() != other["items"].keys():
        return None
    return difference(trained["items"], other["items"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # null in JSON is an undefined score


def _put_on_card(trained: Path, verdicts: Sequence[TestVerdict]) -> None:
    results, path = (to_json([_row(each) for each in verdicts], indent=2) + "\n").encode(), trained / RESULTS
    if verdicts and not (path.is_file() and path.read_bytes() == results):
        write_file(path, results)
        dimension = load_config(str(trained)).get_text_config().hidden_size
        write_card(trained, "/".join(trained.parts[-3:]), dimension)


def _row(verdict: TestVerdict) -> dict[str, str]:
    """A row of the model card's table."""
    row = {"test": verdict.test, "metric": verdict.metric, "items": str(verdict.items)}
    row |= {"base model": f"{verdict.before:.3f}", "this model": f"{verdict.trained:.3f}"}
    row["BM25"] = "" if verdict.bm25 is None else f"{verdict.bm25:.3f}"
    row["this less base"] = "" if verdict.against_before is None else str(verdict.against_before)
    return row


def _record(verdict: TestVerdict) -> dict[str, Any]:
    against = {"before": verdict.against_before, "bm25": verdict.against_bm25}
    words = {f"against_{name}": each and asdict(each) | {"verdict": each.word} for name, each in against.items()}
    return asdict(verdict) | words


# --- Measuring -------------------------------------------------------------------------------------------------------


def _by_model(tests: Tests, recipe: Recipe, model: str) -> Measured:
    embedder = load_to_measure(recipe, model)
    measured = {HELD_OUT: _measured(search_by_embedder(tests.pairs, embedder))} if tests.pairs else {}
    if tests.tasks:
        from anchorembed.evaluate.find import score_on  # noqa: PLC0415 - an extra, which `find_tests` has checked

        for score in score_on(tests.tasks, embedder):
            measured[score.task] = {"metric": score.metric, "value": score.value, "items": dict(score.items)}
    return measured


def _by_bm25(tests: Tests) -> Measured:
    measured: Measured = {}
    if tests.pairs:
        score = by_bm25([text for _, text in tests.pairs.documents])
        measured[HELD_OUT] = _measured(search_by_words(tests.pairs, score))
    if tests.tasks:
        from anchorembed.evaluate.find import score_by_words  # noqa: PLC0415 - as above

        for name, items in score_by_words(tests.tasks, by_bm25).items():
            measured[name] = {"metric": METRIC, "value": math.fsum(items.values()) / len(items), "items": dict(items)}
    return measured


def _measured(scores_Q: Sequence[float]) -> dict[str, Any]:
    items = {str(number): score for number, score in enumerate(scores_Q)}
    return {"metric": METRIC, "value": math.fsum(scores_Q) / len(scores_Q), "items": items}


def _cached(path: Path, key: str, measure: Callable[[], Measured]) -> Measured:
    """Read a measurement from its file if that has the same key; otherwise measure, and write the file."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] == key:
            tests: Measured = record["tests"]
            return tests
    measured = measure()
    write_file(path, to_json({"key": key, "tests": measured}))
    return measured
