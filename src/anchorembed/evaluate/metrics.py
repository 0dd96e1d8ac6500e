"""Metrics of rankings and similarities, computed from numbers alone.

Rankings are scored by trec_eval's definitions (ir-measures), and by their expectation under chance; similarities by
Spearman's correlation. What training says of its held-out pairs needs no extra, and computes nDCG@10 by itself
(`held_out`). Names such as ``ndcg_at_10`` are mteb's.

Axes: N pairs of values.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import AP, RR, P, R, Success, nDCG
from numpy.typing import NDArray
from scipy.stats import rankdata

from anchorembed.data.beir import Collection
from anchorembed.errors import InputError
from anchorembed.evaluate.ranking import ordered

Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade
Array = NDArray[np.float64]

METRICS = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@100": "recall_at_100"}  # name in tables -> mteb's
_SHALLOW, _DEEP = 10, 100  # the cuts of METRICS
DEEPEST = 1000  # the last of mteb's cuts
_FAMILIES = {"ndcg": nDCG, "map": AP, "recall": R, "precision": P, "mrr": RR, "hit_rate": Success}
MTEB_MEASURES = {
    f"{name}_at_{cut}": measure @ cut for name, measure in _FAMILIES.items() for cut in (1, 3, 5, 10, 20, 100, DEEPEST)
}


def measure_queries(
    rankings: Mapping[str, Mapping[str, float]], qrels: Qrels, names: Iterable[str]
) -> dict[str, dict[str, float]]:
    """The named `MTEB_MEASURES` of every query of graded ``qrels``: values[name][query id].

    A document graded above 0 is relevant; its grade is its gain. Every query of ``qrels`` counts: 0 where the rankings
    lack it. Queries that only the rankings have are left out.

    Raises:
        InputError: if there are no qrels.
    """
    if not qrels:
        raise InputError("qrels: there are no judged queries. Give at least one judgement.")
    measures = {MTEB_MEASURES[name]: name for name in names}
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures.values()}
    # ir_measures' providers break ties in opposite ways. Scores that fall with the rank have no ties.
    untied = {
        query: {document: float(-position) for position, document in enumerate(ordered(scores))}
        for query, scores in rankings.items()
        if query in qrels
    }
    judged = {query: dict(grades) for query, grades in qrels.items()}
    for result in ir_measures.iter_calc(list(measures), judged, untied):
        values[measures[result.measure]][result.query_id] = float(result.value)
    return values


def chance(collection: Collection) -> dict[str, float]:
    """Return each metric's exact expectation if every query ranked all documents uniformly at random."""
    ids = {document.id for document in collection.documents}
    per_query = [_chance(grades, ids) for grades in collection.qrels.values()]
    return {name: math.fsum(scores[name] for scores in per_query) / len(per_query) for name in METRICS}


def _chance(grades: Mapping[str, int], ids: set[str]) -> dict[str, float]:
    """One query's expectations; a relevant document outside the corpus counts as relevant but is never ranked."""
    wanted = relevant(grades)
    if not wanted:
        return dict.fromkeys(METRICS, 0.0)
    total, present = len(ids), wanted & ids
    gain = sum(grades[document] for document in present) / total  # of a document drawn at random
    best = sorted((grades[document] for document in wanted), reverse=True)
    return {
        "nDCG@10": _dcg([gain] * min(_SHALLOW, total)) / _dcg(best[:_SHALLOW]),
        "MRR@10": _expected_reciprocal_rank(total, len(present)),
        "Recall@100": min(1.0, _DEEP / total) * len(present) / len(wanted),
    }


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(position + 1) for position, gain in enumerate(gains, start=1))


def _expected_reciprocal_rank(total: int, relevant_count: int) -> float:
    """Sum of 1/k times the probability that a random order has its first relevant document at k, for k up to 10."""
    expected, none_before = 0.0, 1.0
    for position in range(1, min(_SHALLOW, total) + 1):
        chance = relevant_count / (total - position + 1) if none_before else 0.0
        expected += none_before * chance / position
        none_before *= 1 - chance
    return expected


def relevant(grades: Mapping[str, int]) -> set[str]:
    """Ids of the documents graded above 0."""
    return {document for document, grade in grades.items() if grade > 0}


def correlation(rows_2N: Array) -> float:
    """Pearson's correlation of two rows, [2, N]; of ranks it is Spearman's. It is nan if a row is constant."""
    centred_2N = rows_2N - rows_2N.mean(axis=1, keepdims=True)
    lengths_2 = np.linalg.norm(centred_2N, axis=1)
    return float(centred_2N[0] @ centred_2N[1] / lengths_2.prod()) if lengths_2.all() else math.nan


def pseudo_values(first_N: Sequence[float] | Array, second_N: Sequence[float] | Array) -> Array:
    """The contribution of each of N pairs of values to Spearman's correlation, [N]; the mean is the correlation.

    Jackknife pseudo-values (Miller, 1974): N times the correlation less N - 1 times that without the pair, shifted by
    their small bias. They spread as the correlation does, so a bootstrap of their mean gives its interval. (Products of
    standardised ranks have the same mean, but spread too much where the correlation is high.) All are nan if a list is
    constant, or would be without one pair.
    """
    pairs_2N = np.stack([np.asarray(first_N, np.float64), np.asarray(second_N, np.float64)])
    ranks_2N = rankdata(pairs_2N, axis=1)
    without_N = np.empty(pairs_2N.shape[1])
    for column, pair in enumerate(pairs_2N.T):
        above_2N, tied_2N = pairs_2N > pair[:, None], pairs_2N == pair[:, None]
        without_N[column] = correlation(np.delete(ranks_2N - above_2N - 0.5 * tied_2N, column, axis=1))
    values_N: Array = correlation(ranks_2N) + (len(without_N) - 1) * (without_N.mean() - without_N)
    return values_N
