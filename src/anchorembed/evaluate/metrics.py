"""Score an embedder on the data of one test, each kind as mteb scores it, without mteb.

Retrieval and reranking by trec_eval's definitions (ir-measures), similarity by Spearman's correlation of cosines, pairs
by average precision, classification by logistic regressions on a few texts a label. Scores have mteb's names; beside
them stand those of each query or item, whose mean is the main score, for paired tests.

Axes: N items, H hidden size.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ir_measures import AP, RR, P, R, Success, nDCG
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, pairwise

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Documents
from anchorembed.data.judged import LabelledText, SentencePair
from anchorembed.data.store import StoredDocuments
from anchorembed.evaluate.ranking import Qrels, Run, per_query, rank, rank_candidates
from anchorembed.model.vectors import Floats, Side, unit_rows
from anchorembed.search.vector_cache import Texts

_CUTS = (1, 3, 5, 10, 20, 100, 1000)
_MEASURES = {"ndcg": nDCG, "map": AP, "recall": R, "precision": P, "mrr": RR, "hit_rate": Success}
_RANKING = {f"{name}_at_{cut}": measure @ cut for name, measure in _MEASURES.items() for cut in _CUTS}
_TEXTS_PER_LABEL, _DRAWS, _SEED = 8, 10, 42  # mteb's

# kind of task -> mteb's name of its main score, and the field's
MAIN = {
    "Retrieval": ("ndcg_at_10", "nDCG@10"),
    "Reranking": ("map_at_1000", "MAP"),
    "STS": ("cosine_spearman", "Spearman"),
    "PairClassification": ("max_ap", "AP"),
    "Classification": ("accuracy", "accuracy"),
}

Embed = Callable[[Texts, Side], Floats]  # texts -> vectors [N, H]
Items = dict[str, float]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores by mteb's names, and those of single items; no items where the main score is no mean over any."""

    scores: dict[str, Any]
    items: Items


@dataclass(frozen=True, slots=True)
class StrippedTexts:
    """The texts of documents, read as they are gone through."""

    documents: Documents

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[str]:
        return (document.text.strip() for document in self.documents)


def retrieval(collection: Collection, embed: Embed) -> Measured:
    """Every document ranked for each query; the main score is nDCG@10."""
    queries_QH, documents_DH, queries, documents = _embedded(collection, embed)
    run = rank(queries_QH, documents_DH, queries, documents, _CUTS[-1])
    return ranking_scores(run, collection.qrels, "ndcg_at_10")


def reranking(collection: Collection, embed: Embed) -> Measured:
    """The documents judged for each query ranked; the main score is MAP."""
    run = rank_candidates(*_embedded(collection, embed), collection.qrels)
    return ranking_scores(run, collection.qrels, "map_at_1000")


def similarity(pairs: Sequence[SentencePair], embed: Embed) -> Measured:
    """Spearman's correlation of the pairs' cosines with their values; its items are `pseudo_values`."""
    cosine_N = 1 - pairwise.paired_cosine_distances(*_both_sides(pairs, embed))
    both_2N = np.stack([np.array([pair.value for pair in pairs]), cosine_N.astype(np.float64)])
    values_N = pseudo_values(*both_2N)
    scores = {"cosine_pearson": _correlation(both_2N), "cosine_spearman": _correlation(rankdata(both_2N, axis=1))}
    return Measured(scores, numbered(values_N) if np.isfinite(values_N).all() else {})


def pair_classification(pairs: Sequence[SentencePair], embed: Embed) -> Measured:
    """The best average precision that any of five measures of nearness has; it is no mean over pairs."""
    first_NH, second_NH = _both_sides(pairs, embed)
    near = {
        "similarity": paired_cosines(first_NH, second_NH),
        "cosine": 1 - pairwise.paired_cosine_distances(first_NH, second_NH),
        "manhattan": -pairwise.paired_manhattan_distances(first_NH, second_NH),
        "euclidean": -pairwise.paired_euclidean_distances(first_NH, second_NH),
        "dot": np.array([first_H @ second_H for first_H, second_H in zip(first_NH, second_NH, strict=True)]),
    }
    labels = [int(pair.value) for pair in pairs]
    scores = {f"{name}_ap": float(average_precision_score(labels, near_N)) for name, near_N in near.items()}
    return Measured(scores | {"max_ap": max(scores.values())}, {})


def classification(train: Sequence[LabelledText], test: Sequence[LabelledText], embed: Embed) -> Measured:
    """Accuracy of a logistic regression on 8 texts a label, mean of 10 draws; a text's score is its mean over them."""
    draws = drawn([row.label for row in train])
    used = sorted({index for draw in draws for index in draw})
    train_NH = embed([train[index].text for index in used], "query")
    test_NH = embed([row.text for row in test], "query")
    labels = np.array([row.label for row in test])
    right_N, experiments = np.zeros(len(test)), []
    for draw in draws:
        regression = LogisticRegression(max_iter=100, random_state=_SEED)
        regression.fit(train_NH[np.searchsorted(used, draw)], [train[index].label for index in draw])
        predicted = regression.predict(test_NH)
        right_N += predicted == labels
        f1 = float(f1_score(labels, predicted, average="macro"))
        experiments.append({"accuracy": float(np.mean(predicted == labels)), "f1": f1})
    means = {name: float(np.mean([scores[name] for scores in experiments])) for name in ("accuracy", "f1")}
    return Measured(means | {"scores_per_experiment": experiments}, numbered(right_N / _DRAWS))


def drawn(labels: Sequence[str]) -> list[list[int]]:
    """Indices of the texts that each classifier learns from: mteb's own draws, each of which shuffles the last."""
    order, draws = list(range(len(labels))), []
    for _ in range(_DRAWS):
        np.random.RandomState(_SEED).shuffle(order)
        seen: Counter[str] = Counter()
        draw = []
        for index in order:
            seen[labels[index]] += 1
            if seen[labels[index]] <= _TEXTS_PER_LABEL:
                draw.append(index)
        draws.append(draw)
    return draws


def ranking_scores(run: Run, qrels: Qrels, main: str) -> Measured:
    """Measures of a ranking at mteb's cuts, means over queries; the items are of the measure called ``main``."""
    by_measure = per_query(run, qrels, _RANKING.values())
    means = {name: math.fsum(by_measure[measure].values()) / len(qrels) for name, measure in _RANKING.items()}
    return Measured(means, by_measure[_RANKING[main]])


def paired_cosines(first_NH: Floats, second_NH: Floats) -> Floats:
    """Cosine of each pair of rows, [N]."""
    similar_N: Floats = (unit_rows(first_NH) * unit_rows(second_NH)).sum(-1)
    return similar_N


def pseudo_values(first: Sequence[float] | Array, second: Sequence[float] | Array) -> Array:
    """What each of N pairs of values does to Spearman's correlation, [N]; their mean is the correlation.

    Jackknife pseudo-values, N times the correlation less N - 1 times that without the pair (Miller, 1974), shifted by
    their small bias. Their spread is the correlation's own, so that a bootstrap of their mean has its interval; the
    products of standardised ranks, whose mean is the correlation too, spread more the higher it is. Of a list that is
    constant, or is so without one pair, all are nan.
    """
    pairs_2N = np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)])
    ranks_2N = rankdata(pairs_2N, axis=1)
    without = np.empty(len(first))
    for place, pair in enumerate(pairs_2N.T):
        above, tied = pairs_2N > pair[:, None], pairs_2N == pair[:, None]
        without[place] = _correlation(np.delete(ranks_2N - above - 0.5 * tied, place, axis=1))
    values: Array = _correlation(ranks_2N) + (len(without) - 1) * (without.mean() - without)
    return values


def _correlation(rows_2N: Array) -> float:
    centred = rows_2N - rows_2N.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    return float(centred[0] @ centred[1] / lengths.prod()) if lengths.all() else math.nan


def _embedded(collection: Collection, embed: Embed) -> tuple[Floats, Floats, list[str], list[str]]:
    """Vectors of queries and documents, and their ids."""
    queries, documents = collection.queries, collection.documents
    queries_QH = embed([query.text for query in queries], "query")
    documents_DH = embed(StrippedTexts(documents), "document")
    return queries_QH, documents_DH, [query.id for query in queries], _ids(documents)


def _ids(documents: Documents) -> list[str]:
    return documents.ids if isinstance(documents, StoredDocuments) else [document.id for document in documents]


def _both_sides(pairs: Sequence[SentencePair], embed: Embed) -> tuple[Floats, Floats]:
    return embed([pair.first for pair in pairs], "query"), embed([pair.second for pair in pairs], "query")


def numbered(values_N: Array) -> Items:
    """Scores of items that have no ids, by their number from 0."""
    return {str(number): float(value) for number, value in enumerate(values_N)}
