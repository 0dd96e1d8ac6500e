"""Filter written queries: drop copies of the document, duplicates, and queries whose document a search does not find.

Axes: Q queries, D documents.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anchorembed.curate.docstrings import lower_case_words, runs
from anchorembed.curate.mine import words
from anchorembed.data.pairs import folded
from anchorembed.evaluate.ranking import Scorer
from anchorembed.system.files import hash_texts

NONE, SHORT, ECHO, DUPLICATE, LOST = (
    "no query in the reply",
    "fewer than 2 words",
    "copies its document",
    "same as another query",
    "its document is not found again",
)
_MOST_COPIED = 0.5  # share of a query's runs of words
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Query:
    """A query and the row of the document it was written for."""

    text: str
    row: int


def drop_useless(written: Sequence[Sequence[str]], texts: Sequence[str]) -> tuple[list[Query], Counter[str]]:
    """Drop queries that are too short, copy their document or repeat another; returns those kept, and counts by reason.

    Letter case, punctuation and white space make no difference between queries. A query written for several documents
    is dropped for all of them. Replies without a query are counted, too.
    """
    dropped: Counter[str] = Counter(dict.fromkeys((NONE, SHORT, ECHO, DUPLICATE), 0))
    rows_of: dict[str, set[int]] = {}
    for row, queries in enumerate(written):
        for query in queries:
            rows_of.setdefault(_plain(query), set()).add(row)
    kept, seen = [], set[str]()
    for row, queries in enumerate(written):
        dropped[NONE] += not queries
        for query in queries:
            plain = _plain(query)
            if len(words(query)) < 2:
                dropped[SHORT] += 1
            elif copies(query, texts[row]):
                dropped[ECHO] += 1
            elif plain in seen or len(rows_of[plain]) > 1:
                dropped[DUPLICATE] += 1
            else:
                seen.add(plain)
                kept.append(Query(query, row))
    return kept, dropped


def copies(query: str, document: str) -> bool:
    """Whether more than half of a query's runs of five words are in the document; shorter queries have none."""
    query_runs = runs(words(query))
    return len(query_runs & runs(words(document))) > _MOST_COPIED * len(query_runs)


def _plain(query: str) -> str:
    return " ".join(lower_case_words(query)) or folded(query)


def is_retrieved(
    queries: Sequence[Query],
    documents: int,
    score: Scorer,
    within: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[bool]:
    """Whether a search by ``score`` retrieves each query's document, [Q]: fewer than ``within`` documents score higher.

    A document that scores -inf is not retrieved.
    """
    retrieved: list[bool] = []
    size = max(1, _SCORES_AT_ONCE // documents)
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        for query, scores_D in zip(block, score([query.text for query in block]), strict=True):
            limit = scores_D[query.row]
            retrieved.append(bool(limit > -float("inf") and (scores_D > limit).sum() < within))
        progress(len(block))
    return retrieved


def held_out_rows(texts: Sequence[str], most: int) -> set[int]:
    """Rows of the documents to test on: ``most`` of them, at most a fifth, in the order of a hash of their texts."""
    order = sorted(range(len(texts)), key=lambda row: hash_texts([texts[row]]))
    return set(order[: min(most, len(texts) // 5)])
