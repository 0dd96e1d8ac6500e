"""Hard negatives by search: texts that rank high for a query and are not its answer, by BM25 or by an embedder.

The nearest texts are the hardest negatives, but often false ones: answers without a label. Filters drop and count such
texts: the query's positives, the query itself, negatives that the pair has, near-duplicates of the positive, and texts
that score above a share of the positive's score (positive-aware mining: Moreira et al., 2024, arXiv 2407.15831). A
cross-encoder can score the candidates of the search again (`rerank`); then its scores order and filter them, and are
kept with the pairs.

Pairs stream through in windows. Memory holds each text once, BM25's index or vectors [D, H], 16 bytes a pair and a
text, and one window of scores.

Axes: Q queries, D texts, H hidden size.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from anchorembed.curate.rerank import Reranker
from anchorembed.data.pairs import TextPair, folded
from anchorembed.data.store import text_key
from anchorembed.errors import InputError, extra
from anchorembed.evaluate.ranking import Scorer
from anchorembed.model.vectors import Floats, Side, near_top, unit_rows

_SCORES_AT_ONCE = 1 << 24  # of the search
RERANKED_AT_ONCE = 4096  # pairs of query and text, or all of one query if it has more
# Thai to Tibetan, Myanmar, Khmer, kana, Han, and Han beyond the basic plane
_LETTERS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
_LETTERS += "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_SPACELESS = re.compile(f"[{_LETTERS}]+")
_RUNS = re.compile(rf"[{_LETTERS}]+|[^\W{_LETTERS}]{{2,}}")

POSITIVE, QUERY, GIVEN = "own positive", "query itself", "already a negative of the pair"
NEAR, MARGIN = "near-duplicate of the positive", "above the margin"


@dataclass(frozen=True, slots=True)
class Rules:
    """Which texts become negatives.

    Attributes:
        count: negatives to add to each pair.
        first_rank: first rank to take, from 1; the query's positives have no rank.
        last_rank: last rank to take.
        margin: texts that score above this share of the positive's score are dropped; a cross-encoder's logits have no
            meaningful zero, so the share is of their sigmoids.
        near: texts whose words overlap more than this with the positive's (Jaccard) are dropped.
    """

    count: int = 1
    first_rank: int = 1
    last_rank: int = 100
    margin: float = 0.95
    near: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.first_rank <= self.last_rank:
            raise InputError(
                f"--ranks: {self.first_rank} to {self.last_rank}. Give two ranks from 1 on, the smaller first."
            )
        if self.count < 1:
            raise InputError(f"--count: {self.count} is below 1. Ask for at least one negative.")
        if not self.margin > 0:
            raise InputError(f"--margin: {self.margin} is not above 0, so no text is left. 0.95 is usual.")


@dataclass(slots=True)
class Mined:
    """Counts of mining.

    Attributes:
        dropped: texts by filter.
        by_negatives: pairs by how many negatives they got.
        lost_scores: pairs whose own scores do not cover the negatives they got, and are left out.
    """

    dropped: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys((POSITIVE, QUERY, GIVEN, NEAR, MARGIN), 0))
    )
    by_negatives: Counter[int] = field(default_factory=Counter)
    lost_scores: int = 0


class _RowsByKey:
    """Rows of texts by 64-bit key, 16 bytes each."""

    def __init__(self, keys: Iterable[int], rows: Iterable[int]) -> None:
        unordered = np.fromiter(keys, np.uint64)
        order = np.argsort(unordered, kind="stable")
        self._keys, self._rows = unordered[order], np.fromiter(rows, np.int64)[order]

    def of(self, text: str) -> list[int]:
        """Rows that have the key of a text."""
        key = np.uint64(_key(text))
        start, stop = (int(np.searchsorted(self._keys, key, side=side)) for side in ("left", "right"))
        rows: list[int] = self._rows[start:stop].tolist()
        return rows


@dataclass(frozen=True, slots=True)
class Pool:
    """The texts to mine from, each once, and the rows of each query's positives among them."""

    texts: Sequence[str]
    rows: dict[str, int]
    _by_query: _RowsByKey  # of the positive of each pair
    _by_text: _RowsByKey

    def positives(self, query: str) -> set[int]:
        """Rows of a query's positives in all pairs, and of texts that differ from those in case or white space only."""
        return {row for positive in self._by_query.of(query) for row in self._by_text.of(self.texts[positive])}


def by_bm25(texts: Sequence[str]) -> Scorer:
    """Score by BM25 (Lucene's variant, k1 1.2, b 0.75) over `words`.

    A text without any of a query's words scores -inf.

    Raises:
        InputError: if bm25s is not installed.
    """
    with extra("mine"):
        import bm25s  # noqa: PLC0415 - an extra

    interned: dict[str, str] = {}  # one string object for each word, to save memory
    split = [[interned.setdefault(word, word) for word in words(text)] for text in texts]
    index = bm25s.BM25(k1=1.2, b=0.75)
    if has_words := any(split):  # bm25s has no index without words
        index.index(split, show_progress=False)

    def score(queries: list[str]) -> Floats:
        nothing = np.zeros(len(texts), np.float32)
        split_queries = map(words, queries)
        scores_QD = np.stack([index.get_scores(query) if query and has_words else nothing for query in split_queries])
        return np.where(scores_QD > 0, scores_QD, -np.inf).astype(np.float32)

    return score


def words(text: str) -> list[str]:
    """A text's words for BM25: lower-case words of at least two letters or digits.

    Scripts that put no spaces between words, such as Chinese, Japanese and Thai, give pairs of characters instead.
    """
    return [token for run in _RUNS.findall(text.lower()) for token in _tokens(run)]


def _tokens(run: str) -> list[str]:
    if not _SPACELESS.match(run) or len(run) == 1:
        return [run]
    return [run[at : at + 2] for at in range(len(run) - 1)]


def by_embedder(embed: Callable[[Sequence[str], Side], Floats], texts: Sequence[str]) -> Scorer:
    """Score by cosine; ``embed`` gives the vectors [N, H] of texts."""
    documents_HD = unit_rows(embed(texts, "document")).T

    def score(queries: list[str]) -> Floats:
        scores_QD: Floats = unit_rows(embed(queries, "query")) @ documents_HD
        return scores_QD

    return score


def gather(pairs: Iterable[TextPair], corpus: Iterable[str] = ()) -> Pool:
    """The texts to mine from: a corpus, without its empty texts, and the positives of all pairs."""
    rows: dict[str, int] = {}
    for text in filter(str.strip, corpus):
        rows.setdefault(text, len(rows))
    queries, positives = array("Q"), array("q")
    for pair in pairs:
        queries.append(_key(pair.query))
        positives.append(rows.setdefault(pair.positive, len(rows)))
    return Pool([*rows], rows, _RowsByKey(queries, positives), _RowsByKey(map(_key, rows), rows.values()))


def _key(text: str) -> int:
    """64-bit hash of a text, the same whatever its case and white space."""
    return text_key(folded(text))


def mine(
    pairs: Iterable[TextPair], pool: Pool, score: Scorer, rules: Rules, mined: Mined, rerank: Reranker | None = None
) -> Iterator[TextPair]:
    """Add negatives from a pool of the same pairs to each pair, before its own negatives; counts go to ``mined``.

    ``rerank`` scores the candidates of ``score`` again; its logits become the pairs' ``scores``.
    """
    window = max(1, _SCORES_AT_ONCE // len(pool.texts))
    if rerank is not None:
        window = min(window, max(1, RERANKED_AT_ONCE // (rules.last_rank - rules.first_rank + 2)))
    remaining = iter(pairs)
    while block := list(islice(remaining, window)):
        scores_QD = score([pair.query for pair in block])
        if rerank is None:
            judged = (_by_search(*each, pool, rules, mined.dropped) for each in zip(block, scores_QD, strict=True))
            for pair, texts in zip(block, judged, strict=True):
                chosen = _chosen(texts, rules.count, mined)
                mined.lost_scores += bool(chosen and pair.scores)
                yield _with_negatives(pair, chosen, {})
            continue
        candidates_of = [
            [pool.texts[row] for row in _usable(pair, scores_D, pool, rules, mined.dropped)]
            for pair, scores_D in zip(block, scores_QD, strict=True)
        ]
        for pair, candidates, logits in zip(block, candidates_of, _logits(block, candidates_of, rerank), strict=True):
            texts = _by_reranker(pair, candidates, logits, rules.margin)
            yield _with_negatives(pair, _chosen(texts, rules.count, mined), logits)


Judged = Iterable[tuple[str, bool]]  # texts, the nearest first, and whether they score above the margin


def _by_search(pair: TextPair, scores_D: Floats, pool: Pool, rules: Rules, dropped: Counter[str]) -> Judged:
    score = float(scores_D[pool.rows[pair.positive]])
    limit = rules.margin * score if score > 0 else score
    for row in _usable(pair, scores_D, pool, rules, dropped):
        yield pool.texts[row], float(scores_D[row]) > limit


def _by_reranker(pair: TextPair, candidates: list[str], logits: dict[str, float], margin: float) -> Judged:
    limit = margin * _sigmoid(logits[pair.positive])
    for text in sorted(candidates, key=lambda text: -logits[text]):
        yield text, _sigmoid(logits[text]) > limit


def _chosen(judged: Judged, count: int, mined: Mined) -> list[str]:
    """The first ``count`` texts that are not above the margin; texts above it are counted."""
    chosen: list[str] = []
    for text, above in judged:
        if above:
            mined.dropped[MARGIN] += 1
        else:
            chosen.append(text)
        if len(chosen) == count:
            break
    mined.by_negatives[len(chosen)] += 1
    return chosen


def _with_negatives(pair: TextPair, chosen: list[str], logits: dict[str, float]) -> TextPair:
    """The pair with chosen negatives before its own, and with the reranker's logits of all its texts as scores.

    Without logits the pair keeps its own scores, unless a negative is added, which they would not cover.
    """
    if not chosen and not logits:
        return pair
    negatives = (*chosen, *pair.negatives)
    scores = tuple(logits[text] for text in (pair.positive, *negatives)) if logits else ()
    return replace(pair, negatives=negatives, scores=scores)


def _logits(block: list[TextPair], candidates_of: list[list[str]], rerank: Reranker) -> Iterator[dict[str, float]]:
    """A reranker's logits of each pair's positive, candidates and own negatives, by text."""
    texts_of = [
        list(dict.fromkeys((pair.positive, *candidates, *pair.negatives)))
        for pair, candidates in zip(block, candidates_of, strict=True)
    ]
    flat = [(pair.query, text) for pair, texts in zip(block, texts_of, strict=True) for text in texts]
    logits = iter(rerank(flat).tolist())
    for texts in texts_of:
        yield dict(zip(texts, logits, strict=False))


def _sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), exact for logits far below 0."""
    return float(np.exp(-np.logaddexp(0.0, -logit)))


def _candidates(scores_D: Floats, positives: set[int], rules: Rules, dropped: Counter[str]) -> Iterator[int]:
    """Rows of the ranks to take, nearest first; a query's positives and texts that score -inf have no rank."""
    rank = 0
    most = rules.last_rank + len(positives)
    near = near_top(scores_D, most, 0.0)
    for row in near[np.argsort(-scores_D[near], kind="stable")][:most].tolist():
        if rank == rules.last_rank or scores_D[row] == -np.inf:
            return
        if row in positives:
            dropped[POSITIVE] += 1
            continue
        rank += 1
        if rank >= rules.first_rank:
            yield row


def _usable(pair: TextPair, scores_D: Floats, pool: Pool, rules: Rules, dropped: Counter[str]) -> Iterator[int]:
    """Rows of the candidates, nearest first, that are not the query, a negative or a near-duplicate of the positive."""
    query, positive = folded(pair.query), set(folded(pair.positive).split())
    negatives = set(map(folded, pair.negatives))
    for row in _candidates(scores_D, pool.positives(pair.query), rules, dropped):
        text = folded(pool.texts[row])
        if text == query:
            dropped[QUERY] += 1
        elif text in negatives:
            dropped[GIVEN] += 1
        elif _overlap(set(text.split()), positive) > rules.near:
            dropped[NEAR] += 1
        else:
            negatives.add(text)
            yield row


def _overlap(words: set[str], others: set[str]) -> float:
    """Words in both sets as a share of those in either (Jaccard)."""
    either = len(words | others)
    return len(words & others) / either if either else 0.0
