"""Retrieval quality by trec_eval's definitions, with chance as the yardstick.

trec_eval compares scores in single precision and puts the larger document id first where they are equal. That rule is
applied once, here, both where a ranking is cut and where it is scored, so no metric depends on the order of documents.

Axes: Q queries, D documents, H hidden size.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np
from ir_measures import Measure

from anchorembed.data.beir import Collection
from anchorembed.errors import InputError
from anchorembed.model.vectors import Encoder, Floats, cosines, near_top, rounding, unit_rows

Run = dict[str, dict[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

METRICS = ("nDCG@10", "MRR@10", "Recall@100")
_MEASURES = {ir_measures.nDCG @ 10: "nDCG@10", ir_measures.RR @ 10: "MRR@10", ir_measures.R @ 100: "Recall@100"}
_SHALLOW, _DEEP = 10, 100  # the metrics' cut-offs
_SCORES_PER_BLOCK, _DOCUMENTS_PER_BLOCK = 1 << 24, 1 << 17
_NOT_FINITE = "model: it gives vectors that are not finite. Its weights are damaged; use another checkpoint."


@dataclass(frozen=True, slots=True)
class Scores:
    """``per_query[query id][metric]`` for every judged query, and each metric's ``mean`` over them."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_collection(encoder: Encoder, collection: Collection, top_k: int = _DEEP) -> Scores:
    """Embed the judged queries and all documents, rank every document by cosine, and score the ``top_k`` of each query.

    Raises InputError if ``top_k`` is too small for Recall@100, or if there is nothing to rank.
    """
    if top_k < _DEEP:
        raise InputError(f"top_k: {top_k} is below {_DEEP}, which Recall@{_DEEP} needs. Use {_DEEP} or more.")
    queries = [query for query in collection.queries if query.id in collection.qrels]
    if not queries or not collection.documents:
        raise InputError(f"{collection.name}: no judged query or no document. Give a collection with both.")
    queries_QH = encoder.encode([query.text for query in queries], "query")
    documents_DH = encoder.encode([document.text for document in collection.documents], "document")
    ranked = rank(
        queries_QH,
        documents_DH,
        [query.id for query in queries],
        [document.id for document in collection.documents],
        top_k,
    )
    return score_run(ranked, collection.qrels)


def rank(
    queries_QH: Floats,
    documents_DH: Floats,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    top_k: int = _DEEP,
) -> Run:
    """Return each query's ``top_k`` documents by cosine, best first, as ``run[query id][document id]``.

    The rows are scaled to length 1 here. A block of queries is compared with one of documents by a float32 product, so
    vectors may be memory-mapped; what
    that rounding could have misplaced around the cut is computed again exactly, so equal documents tie exactly.
    """
    if top_k < 1:
        raise InputError(f"top_k: {top_k} is below 1. Ask for at least one document.")
    if not np.isfinite(queries_QH).all():
        raise InputError(_NOT_FINITE)
    if len(documents_DH) != len(document_ids):
        raise ValueError(f"{len(documents_DH)} document vectors for {len(document_ids)} ids")
    queries_QH = unit_rows(queries_QH)
    run: Run = {query_id: {} for query_id in query_ids}
    for first in range(0, len(document_ids), _DOCUMENTS_PER_BLOCK):
        rows = slice(first, first + _DOCUMENTS_PER_BLOCK)
        for query_id, found in _rank_block(queries_QH, documents_DH[rows], query_ids, document_ids[rows], top_k):
            best = run[query_id] | found
            run[query_id] = {document: best[document] for document in ordered(best)[:top_k]}
    return run


def _rank_block(
    queries_QH: Floats, documents_DH: Floats, query_ids: Sequence[str], document_ids: Sequence[str], top_k: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each query with what may be among its ``top_k`` of a block of documents."""
    if not np.isfinite(documents_DH).all():
        raise InputError(_NOT_FINITE)
    documents_DH = unit_rows(documents_DH)
    block = max(1, _SCORES_PER_BLOCK // max(1, len(document_ids)))
    for start in range(0, len(query_ids), block):
        rows = slice(start, start + block)
        scores_QD = queries_QH[rows] @ documents_DH.T
        for query_id, query_H, scores_D in zip(query_ids[rows], queries_QH[rows], scores_QD, strict=True):
            near = near_top(scores_D, top_k, rounding(len(query_H)))
            exact = cosines(query_H, documents_DH[near]).tolist()
            yield query_id, {document_ids[row]: score for row, score in zip(near.tolist(), exact, strict=True)}


def rank_candidates(
    queries_QH: Floats,
    documents_DH: Floats,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    candidates: Mapping[str, Iterable[str]],
) -> Run:
    """Score only each query's own ``candidates`` by cosine, as ``run[query id][document id]``."""
    rows = {name: row for row, name in enumerate(document_ids)}
    run: Run = {}
    for name, query_H in zip(query_ids, unit_rows(queries_QH), strict=True):
        own = list(candidates.get(name, ()))
        scores = cosines(query_H, unit_rows(documents_DH[[rows[candidate] for candidate in own]]))
        run[name] = dict(zip(own, scores.tolist(), strict=True))
    return run


def ordered(scores: Mapping[str, float]) -> list[str]:
    """Return document ids best first as trec_eval orders them: by float32 score, then by id, both descending."""
    return sorted(scores, key=lambda document: (float(np.float32(scores[document])), document), reverse=True)


def score_run(run: Mapping[str, Mapping[str, float]], qrels: Qrels) -> Scores:
    """Score ``run`` against graded ``qrels``: a document is relevant above 0, and its grade is its gain.

    Every query of ``qrels`` counts: 0 where the run lacks it. Queries that only the run has are left out.
    """
    by_measure = per_query(run, qrels, _MEASURES)
    every = {query: {name: by_measure[measure][query] for measure, name in _MEASURES.items()} for query in qrels}
    return Scores(_means(every), every)


def per_query(
    run: Mapping[str, Mapping[str, float]], qrels: Qrels, measures: Iterable[Measure]
) -> dict[Measure, dict[str, float]]:
    """Measures of ir_measures for every query of ``qrels``, as `score_run` counts them."""
    if not qrels:
        raise InputError("qrels: there are no judged queries. Give at least one judgement.")
    scores = {measure: dict.fromkeys(qrels, 0.0) for measure in measures}
    # ir_measures' providers break ties in opposite ways; scores that only count down the order leave them no ties.
    untied = {
        query: {document: float(-place) for place, document in enumerate(ordered(found))}
        for query, found in run.items()
        if query in qrels
    }
    judged = {query: dict(grades) for query, grades in qrels.items()}
    for result in ir_measures.iter_calc(list(scores), judged, untied):
        scores[result.measure][result.query_id] = float(result.value)
    return scores


def chance(collection: Collection) -> dict[str, float]:
    """Return each metric's exact expectation if every query ranked all documents uniformly at random."""
    ids = {document.id for document in collection.documents}
    if not collection.qrels or not ids:
        raise InputError(f"{collection.name}: no judged query or no document. Give a collection with both.")
    return _means({query: _chance(grades, ids) for query, grades in collection.qrels.items()})


def subset(collection: Collection, documents: int, seed: int = 0) -> Collection:
    """Return a small collection of at most ``documents`` documents that depends only on ids, judgements and ``seed``.

    Queries are taken in an order hashed from their ids, each with all its relevant documents where they still fit;
    other documents, in a like order, fill the rest. Kept are the queries that have all their relevant documents there.
    Raises InputError if there are none.
    """
    if documents < 1:
        raise InputError(f"documents: {documents} is below 1. Ask for at least one document.")
    ids = {document.id for document in collection.documents}
    grades = {query.id: collection.qrels.get(query.id, {}) for query in collection.queries}
    relevant = {query: _relevant(judged) for query, judged in grades.items() if _relevant(judged) <= ids}
    pool: set[str] = set()
    for query in sorted(relevant, key=lambda name: _shuffled(name, seed)):
        if len(pool | relevant[query]) <= documents:
            pool |= relevant[query]
    others = sorted(ids - pool, key=lambda name: _shuffled(name, seed))
    pool.update(others[: documents - len(pool)])
    kept = {query for query, wanted in relevant.items() if wanted and wanted <= pool}
    if not kept:
        raise InputError(
            f"{collection.name}: no query has all its relevant documents in {documents}. Ask for more documents."
        )
    return Collection(
        f"{collection.name}-{len(pool)}",
        tuple(document for document in collection.documents if document.id in pool),
        tuple(query for query in collection.queries if query.id in kept),
        {
            query: {document: grade for document, grade in judged.items() if document in pool}
            for query, judged in grades.items()
            if query in kept
        },
    )


def _chance(grades: Mapping[str, int], ids: set[str]) -> dict[str, float]:
    """Return one query's expectations; a relevant document outside the corpus counts as wanted but is never found."""
    wanted = _relevant(grades)
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
    return math.fsum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def _expected_reciprocal_rank(total: int, relevant: int) -> float:
    """Sum of 1/k times the chance that the first relevant document of a random order stands at k, for k up to 10."""
    expected, none_before = 0.0, 1.0
    for place in range(1, min(_SHALLOW, total) + 1):
        here = relevant / (total - place + 1) if none_before else 0.0
        expected += none_before * here / place
        none_before *= 1 - here
    return expected


def _relevant(grades: Mapping[str, int]) -> set[str]:
    return {document for document, grade in grades.items() if grade > 0}


def _shuffled(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _means(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(scores[name] for scores in per_query.values()) / len(per_query) for name in METRICS}
