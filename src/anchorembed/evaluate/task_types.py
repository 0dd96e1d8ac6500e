"""The types of tasks: which texts each embeds, and its metrics, which are mteb's, computed without mteb.

Retrieval and reranking are scored as rankings, similarity by Spearman's correlation of cosines, pairs by average
precision, classification by logistic regressions on a few texts a label. For paired tests, a task also has the main
metric of each query, pair or text; their mean is the task's.

Axes: Q queries, D documents, N items, H hidden size.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, pairwise

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Documents
from anchorembed.data.evaluation_files import LabelledText, SentencePair
from anchorembed.data.store import StoredDocuments
from anchorembed.evaluate.metrics import (
    DEEPEST,
    METRICS,
    MTEB_MEASURES,
    Array,
    Qrels,
    correlation,
    measure_queries,
    pseudo_values,
)
from anchorembed.evaluate.ranking import Rankings, Scorer, rank, rank_candidates
from anchorembed.model.vectors import Floats, Side, check_finite, near_top, unit_rows
from anchorembed.search.vector_cache import Texts

_TEXTS_PER_LABEL, _DRAWS, _SEED = 8, 10, 42  # mteb's

# type of task -> main metric: mteb's name, and the name in tables
MAIN_METRICS = {
    "Retrieval": ("ndcg_at_10", "nDCG@10"),
    "Reranking": ("map_at_1000", "MAP"),
    "STS": ("cosine_spearman", "Spearman"),
    "PairClassification": ("max_ap", "AP"),
    "Classification": ("accuracy", "accuracy"),
}

Embed = Callable[[Texts, Side], Floats]  # texts -> vectors [N, H]
Items = dict[str, float]  # id of a query, pair or text -> its main metric


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """A task's metrics by mteb's names; no items if the main metric is not a mean over items."""

    values: dict[str, Any]
    items: Items


@dataclass(frozen=True, slots=True)
class StrippedTexts:
    """The texts of documents without leading and trailing white space, read while iterating."""

    documents: Documents

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[str]:
        return (document.text.strip() for document in self.documents)


def evaluate_collection(embed: Embed, collection: Collection) -> dict[str, float]:
    """Rank all documents for each query; returns the mean of each of `METRICS`."""
    values = retrieval(collection, embed).values
    return {shown: values[name] for shown, name in METRICS.items()}


def retrieval(collection: Collection, embed: Embed) -> TaskMetrics:
    """Rank all documents for each query; the main metric is nDCG@10."""
    rankings = rank(*_embed_collection(collection, embed), DEEPEST)
    return ranking_metrics(rankings, collection.qrels, "ndcg_at_10")


def search_by_scores(collection: Collection, by_words: Callable[[Sequence[str]], Scorer]) -> Items:
    """nDCG@10 of each query, ranked by a ``Scorer`` of the documents' texts; a score of -inf counts as not found."""
    ids, queries = _ids(collection.documents), [query for query in collection.queries if query.id in collection.qrels]
    score, rankings = by_words(list(StrippedTexts(collection.documents))), Rankings()
    for query in queries:
        (scores_D,) = score([query.text])
        near = near_top(scores_D, DEEPEST, 0.0)
        rankings[query.id] = {ids[row]: float(scores_D[row]) for row in near if scores_D[row] > -np.inf}
    return measure_queries(rankings, collection.qrels, ["ndcg_at_10"])["ndcg_at_10"]


def reranking(collection: Collection, embed: Embed) -> TaskMetrics:
    """Rank the documents judged for each query; the main metric is MAP."""
    rankings = rank_candidates(*_embed_collection(collection, embed), collection.qrels)
    return ranking_metrics(rankings, collection.qrels, "map_at_1000")


def ranking_metrics(rankings: Rankings, qrels: Qrels, main: str) -> TaskMetrics:
    """All `MTEB_MEASURES`, averaged over queries; the items are the measure ``main`` of each query."""
    measured = measure_queries(rankings, qrels, MTEB_MEASURES)
    means = {name: math.fsum(by_query.values()) / len(qrels) for name, by_query in measured.items()}
    return TaskMetrics(means, measured[main])


def similarity(pairs: Sequence[SentencePair], embed: Embed) -> TaskMetrics:
    """Correlate the pairs' cosines with their values; the main metric is Spearman's, the items are `pseudo_values`."""
    cosines_N = 1 - pairwise.paired_cosine_distances(*_embed_pairs(pairs, embed))
    both_2N = np.stack([np.array([pair.value for pair in pairs]), cosines_N.astype(np.float64)])
    values_N = pseudo_values(*both_2N)
    metrics = {"cosine_pearson": correlation(both_2N), "cosine_spearman": correlation(rankdata(both_2N, axis=1))}
    return TaskMetrics(metrics, numbered(values_N) if np.isfinite(values_N).all() else {})


def pair_classification(pairs: Sequence[SentencePair], embed: Embed) -> TaskMetrics:
    """Classify pairs as alike or not; the main metric is the best average precision of five measures of nearness."""
    first_NH, second_NH = _embed_pairs(pairs, embed)
    nearness = {
        "similarity": paired_cosines(first_NH, second_NH),
        "cosine": 1 - pairwise.paired_cosine_distances(first_NH, second_NH),
        "manhattan": -pairwise.paired_manhattan_distances(first_NH, second_NH),
        "euclidean": -pairwise.paired_euclidean_distances(first_NH, second_NH),
        "dot": np.array([first_H @ second_H for first_H, second_H in zip(first_NH, second_NH, strict=True)]),
    }
    labels = [int(pair.value) for pair in pairs]
    metrics = {f"{name}_ap": float(average_precision_score(labels, near_N)) for name, near_N in nearness.items()}
    return TaskMetrics(metrics | {"max_ap": max(metrics.values())}, {})


def classification(train: Sequence[LabelledText], test: Sequence[LabelledText], embed: Embed) -> TaskMetrics:
    """Fit a logistic regression on 8 texts a label, 10 times; the main metric is the mean accuracy.

    A text's item is the share of regressions that predict its label.
    """
    draws = draw_training_texts([row.label for row in train])
    used = sorted({index for draw in draws for index in draw})
    train_NH = embed([train[index].text for index in used], "query")
    test_NH = embed([row.text for row in test], "query")
    check_finite(train_NH)
    check_finite(test_NH)
    labels = np.array([row.label for row in test])
    right_N, experiments = np.zeros(len(test)), []
    for draw in draws:
        regression = LogisticRegression(max_iter=100, random_state=_SEED)
        regression.fit(train_NH[np.searchsorted(used, draw)], [train[index].label for index in draw])
        predicted = regression.predict(test_NH)
        right_N += predicted == labels
        experiments.append(
            {"accuracy": float(np.mean(predicted == labels)), "f1": float(f1_score(labels, predicted, average="macro"))}
        )
    means = {name: float(np.mean([metrics[name] for metrics in experiments])) for name in experiments[0]}
    return TaskMetrics(means | {"scores_per_experiment": experiments}, numbered(right_N / _DRAWS))


def draw_training_texts(labels: Sequence[str]) -> list[list[int]]:
    """Indices of the texts that each regression is fitted on, as mteb draws them: each shuffles the previous order."""
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


def paired_cosines(first_NH: Floats, second_NH: Floats) -> Floats:
    """Cosine of each pair of rows, [N]."""
    cosines_N: Floats = (unit_rows(first_NH) * unit_rows(second_NH)).sum(-1)
    return cosines_N


def numbered(values_N: Array) -> Items:
    """Values of items that have no ids, by their number from 0."""
    return {str(number): float(value) for number, value in enumerate(values_N)}


def _embed_collection(collection: Collection, embed: Embed) -> tuple[Floats, Floats, list[str], list[str]]:
    """Vectors of queries [Q, H] and documents [D, H], and their ids."""
    queries, documents = collection.queries, collection.documents
    queries_QH = embed([query.text for query in queries], "query")
    documents_DH = embed(StrippedTexts(documents), "document")
    return queries_QH, documents_DH, [query.id for query in queries], _ids(documents)


def _ids(documents: Documents) -> list[str]:
    return documents.ids if isinstance(documents, StoredDocuments) else [document.id for document in documents]


def _embed_pairs(pairs: Sequence[SentencePair], embed: Embed) -> tuple[Floats, Floats]:
    first_NH, second_NH = (embed(texts, "query") for texts in zip(*((p.first, p.second) for p in pairs), strict=True))
    check_finite(first_NH)
    check_finite(second_NH)
    return first_NH, second_NH
