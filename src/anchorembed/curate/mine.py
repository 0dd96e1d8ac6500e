"""Hard negatives by search: texts that rank high for a query and are not its answer, by BM25 or by an embedder.

The nearest texts are the hardest negatives, and the likeliest to be answers that are missing from the data. Filters
drop such texts and count them: the query's positives, the query itself, near-duplicates of the positive, and texts
that score above a share of the positive's score (positive-aware mining: Moreira et al., 2024, arXiv 2407.15831).

Axes: Q queries, D texts, H hidden size.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anchorembed.data.pairs import TextPair, folded
from anchorembed.errors import InputError, extra
from anchorembed.model.vectors import Floats, Side, near_top, unit_rows

Scorer = Callable[[list[str]], Floats]  # queries -> scores of all texts [Q, D], higher is nearer
_SCORES_AT_ONCE = 1 << 24
# Thai to Tibetan, Myanmar, Khmer, kana, Han, and Han beyond the basic plane
_LETTERS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
_LETTERS += "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_SPACELESS = re.compile(f"[{_LETTERS}]+")
_RUNS = re.compile(rf"[{_LETTERS}]+|[^\W{_LETTERS}]{{2,}}")

POSITIVE, QUERY, NEAR, MARGIN = "own positive", "query itself", "near-duplicate of the positive", "above the margin"


@dataclass(frozen=True, slots=True)
class Rules:
    """Which texts become negatives.

    Attributes:
        count: negatives of a pair.
        first_rank: of those to take, from 1; the query's positives have no rank.
        last_rank: of those to take.
        margin: a text is dropped that scores above this share of the positive's score.
        near: a text is dropped whose words overlap more than this with the positive's (Jaccard).
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


@dataclass(frozen=True, slots=True)
class Mined:
    """Pairs with their negatives; ``dropped`` texts by filter; ``by_negatives[n]`` pairs that got n negatives."""

    pairs: list[TextPair]
    dropped: dict[str, int]
    by_negatives: dict[int, int]


def by_bm25(texts: Sequence[str]) -> Scorer:
    """Score by BM25 (Lucene's variant, k1 1.2, b 0.75) over `words`.

    A text without any of a query's words scores -inf.

    Raises:
        InputError: if bm25s is not installed.
    """
    with extra("mine"):
        import bm25s  # noqa: PLC0415 - an extra

    split = [words(text) for text in texts]
    index = bm25s.BM25(k1=1.2, b=0.75)
    if has_words := any(split):  # bm25s has no index without words
        index.index(split, show_progress=False)

    def score(queries: list[str]) -> Floats:
        nothing = np.zeros(len(texts), np.float32)
        wanted = map(words, queries)
        scores_QD = np.stack([index.get_scores(each) if each and has_words else nothing for each in wanted])
        return np.where(scores_QD > 0, scores_QD, -np.inf).astype(np.float32)

    return score


def words(text: str) -> list[str]:
    """What BM25 takes for a text's words: lower-cased words of at least two letters or digits.

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


def gather(pairs: Iterable[TextPair], corpus: Iterable[str] = ()) -> list[str]:
    """The texts to mine from, each once: a corpus and the positives of all pairs."""
    return list(dict.fromkeys((*corpus, *(pair.positive for pair in pairs))))


def mine(
    pairs: Sequence[TextPair],
    texts: Sequence[str],
    score: Scorer,
    rules: Rules,
    progress: Callable[[int], None] = lambda _: None,
) -> Mined:
    """Give each pair negatives, which go before those it has.

    Args:
        pairs: queries with their positives.
        texts: to mine from, as `gather` returns them: all positives are among them.
        score: scores ``texts``.
        rules: which texts to take.
        progress: called with the number of pairs done since the last call.
    """
    rows = {text: row for row, text in enumerate(texts)}
    positives: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        positives[folded(pair.query)].add(rows[pair.positive])
    dropped: Counter[str] = Counter(dict.fromkeys((POSITIVE, QUERY, NEAR, MARGIN), 0))
    by_negatives: Counter[int] = Counter()
    mined: list[TextPair] = []
    size = max(1, _SCORES_AT_ONCE // len(texts))
    for start in range(0, len(pairs), size):
        block = pairs[start : start + size]
        for pair, scores_D in zip(block, score([pair.query for pair in block]), strict=True):
            limit = _limit(float(scores_D[rows[pair.positive]]), rules.margin)
            candidates = _candidates(scores_D, positives[folded(pair.query)], rules, dropped)
            chosen: list[str] = []
            for row in candidates:
                filter_name = _filter(pair, texts[row], float(scores_D[row]) > limit, rules.near)
                if filter_name:
                    dropped[filter_name] += 1
                else:
                    chosen.append(texts[row])
                if len(chosen) == rules.count:
                    break
            by_negatives[len(chosen)] += 1
            kept = [text for text in pair.negatives if text not in chosen]
            mined.append(replace(pair, negatives=(*chosen, *kept), scores=()))
        progress(len(block))
    return Mined(mined, dict(dropped), dict(sorted(by_negatives.items())))


def _limit(positive_score: float, margin: float) -> float:
    """The score above which a text is dropped: a share of the positive's, or all of it where it is not above 0."""
    return margin * positive_score if positive_score > 0 else positive_score


def _candidates(scores_D: Floats, positives: set[int], rules: Rules, dropped: Counter[str]) -> Iterator[int]:
    """Rows of the ranks asked for, nearest first; a query's positives and texts that score -inf have no rank."""
    rank = 0
    for row in _nearest(scores_D, rules.last_rank + len(positives)):
        if rank == rules.last_rank or scores_D[row] == -np.inf:
            return
        if row in positives:
            dropped[POSITIVE] += 1
            continue
        rank += 1
        if rank >= rules.first_rank:
            yield row


def _filter(pair: TextPair, text: str, above: bool, near: float) -> str:
    """Name of the filter that drops a text; empty for none."""
    if folded(text) == folded(pair.query):
        return QUERY
    words, positive = set(folded(text).split()), set(folded(pair.positive).split())
    if len(words & positive) > near * len(words | positive):
        return NEAR
    return MARGIN if above else ""


def _nearest(scores_D: Floats, most: int) -> list[int]:
    """Rows by score, best first, at most ``most``; equal scores by row."""
    near = near_top(scores_D, most, 0.0)
    order: list[int] = near[np.argsort(-scores_D[near], kind="stable")][:most].tolist()
    return order
