"""Hard negatives by search: texts that rank high for a query and are not its answer, by BM25 or by an embedder.

The nearest texts are the hardest, and the likeliest to be answers nobody wrote down. Named filters leave those out,
and each counts what it dropped: the query's own positives, the query itself, near-duplicates of the positive, and what
scores above a share of the positive's score (positive-aware mining: Moreira et al., 2024, arXiv 2407.15831).

Axes: Q queries, D texts, H hidden size.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError, extra
from anchorembed.model.vectors import Floats, Side, near_top, unit_rows

Scorer = Callable[[list[str]], Floats]  # queries -> their scores of all texts [Q, D], higher is nearer
_SCORES_PER_BLOCK = 1 << 24

POSITIVE, QUERY, NEAR, MARGIN = "own positive", "query itself", "near-duplicate of the positive", "above the margin"


@dataclass(frozen=True, slots=True)
class Rules:
    """Which texts become negatives.

    ``count`` of each pair, from the ranks ``first`` to ``last``, counted from 1 without the query's own positives.
    Left out is what scores above ``margin`` times the positive's score, and what shares more than ``near`` of its words
    with the positive (Jaccard).
    """

    count: int = 1
    first: int = 1
    last: int = 100
    margin: float = 0.95
    near: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise InputError(f"--ranks: {self.first} to {self.last}. Give two ranks from 1 on, the smaller first.")
        if self.count < 1:
            raise InputError(f"--count: {self.count} is below 1. Ask for at least one negative.")


@dataclass(frozen=True, slots=True)
class Mined:
    """Pairs with their negatives; ``dropped`` candidates by filter, and ``found[n]`` pairs that got n negatives."""

    pairs: list[TextPair]
    dropped: dict[str, int]
    found: dict[int, int]


def by_bm25(texts: Sequence[str]) -> Scorer:
    """Score by BM25 (Lucene's variant, k1 1.2, b 0.75) over lower-cased words of at least two letters.

    A text without any of a query's words scores -inf: it is not near. Raises InputError if bm25s is not installed.
    """
    with extra("mine"):
        import bm25s  # noqa: PLC0415 - an extra

    def split(these: Sequence[str]) -> list[list[str]]:
        words: Any = bm25s.tokenize(list(these), stopwords=None, return_ids=False, show_progress=False)
        return list(words)

    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index(split(texts), show_progress=False)

    def score(queries: list[str]) -> Floats:
        nothing = np.zeros(len(texts), np.float32)
        scores_QD = np.stack([index.get_scores(words) if words else nothing for words in split(queries)])
        return np.where(scores_QD > 0, scores_QD, -np.inf).astype(np.float32)

    return score


def by_embedder(embed: Callable[[Sequence[str], Side], Floats], texts: Sequence[str]) -> Scorer:
    """Score by cosine; ``embed`` gives the vectors [N, H] of texts."""
    documents_HD = unit_rows(embed(texts, "document")).T

    def score(queries: list[str]) -> Floats:
        scores_QD: Floats = unit_rows(embed(queries, "query")) @ documents_HD
        return scores_QD

    return score


def gather(pairs: Iterable[TextPair], corpus: Iterable[str] = ()) -> list[str]:
    """The texts to mine from: a corpus and the positives of all pairs, each once."""
    return list(dict.fromkeys((*corpus, *(pair.positive for pair in pairs))))


def mine(
    pairs: Sequence[TextPair],
    texts: Sequence[str],
    score: Scorer,
    rules: Rules,
    advance: Callable[[int], None] = lambda _: None,
) -> Mined:
    """Give each pair negatives; what it had stands after them.

    Args:
        pairs: queries with their positives.
        texts: as `gather` makes them: all positives are among them.
        score: over ``texts``.
        rules: which to take.
        advance: called with the number of pairs done.
    """
    rows = {text: row for row, text in enumerate(texts)}
    positives: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        positives[_plain(pair.query)].add(rows[pair.positive])
    dropped: Counter[str] = Counter(dict.fromkeys((POSITIVE, QUERY, NEAR, MARGIN), 0))
    found: Counter[int] = Counter()
    mined: list[TextPair] = []
    block = max(1, _SCORES_PER_BLOCK // len(texts))
    for start in range(0, len(pairs), block):
        part = pairs[start : start + block]
        for pair, scores_D in zip(part, score([pair.query for pair in part]), strict=True):
            own, limit = positives[_plain(pair.query)], _limit(float(scores_D[rows[pair.positive]]), rules.margin)
            chosen: list[str] = []
            for row in _window(scores_D, own, rules, dropped):
                fault = _fault(pair, texts[row], float(scores_D[row]) > limit, rules.near)
                if fault:
                    dropped[fault] += 1
                else:
                    chosen.append(texts[row])
                if len(chosen) == rules.count:
                    break
            found[len(chosen)] += 1
            kept = [text for text in pair.negatives if text not in chosen]
            mined.append(replace(pair, negatives=(*chosen, *kept), scores=()))
        advance(len(part))
    return Mined(mined, dict(dropped), dict(sorted(found.items())))


def _limit(right: float, margin: float) -> float:
    """The score above which a text may be an answer, too, where the positive's is ``right``: of -inf any is."""
    return margin * right if right > 0 else right


def _window(scores_D: Floats, own: set[int], rules: Rules, dropped: Counter[str]) -> Iterator[int]:
    """Rows of the ranks asked for, nearest first; the query's own positives have no rank, nor has what is not near."""
    place = 0
    for row in _nearest(scores_D, rules.last + len(own)):
        if place == rules.last or scores_D[row] == -np.inf:
            return
        if row in own:
            dropped[POSITIVE] += 1
            continue
        place += 1
        if place >= rules.first:
            yield row


def _fault(pair: TextPair, text: str, above: bool, near: float) -> str:
    """Name of the filter that drops a candidate; empty for none."""
    if _plain(text) == _plain(pair.query):
        return QUERY
    words, positive = set(_plain(text).split()), set(_plain(pair.positive).split())
    if len(words & positive) > near * len(words | positive):
        return NEAR
    return MARGIN if above else ""


def _nearest(scores_D: Floats, most: int) -> list[int]:
    """Rows by score, best first, equal ones in their order."""
    near = near_top(scores_D, most, 0.0)
    order: list[int] = near[np.argsort(-scores_D[near], kind="stable")][:most].tolist()
    return order


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
