"""Rank documents for queries by cosine.

trec_eval compares scores in single precision, and puts the larger document id first where they are equal. `ordered`
follows that rule, both to cut a ranking and to score it, so no metric depends on the documents' order.

Axes: Q queries, D documents, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from anchorembed.model.vectors import Floats, check_finite, cosines, near_top, rounding, unit_rows

Scorer = Callable[[list[str]], Floats]  # queries -> scores of all documents [Q, D], higher is nearer, -inf is not found
Rankings = dict[str, dict[str, float]]  # query id -> document id -> score

_SCORES_PER_BLOCK, _DOCUMENTS_PER_BLOCK = 1 << 24, 1 << 17


def rank(
    queries_QH: Floats, documents_DH: Floats, query_ids: Sequence[str], document_ids: Sequence[str], top_k: int = 100
) -> Rankings:
    """Return each query's ``top_k`` documents by cosine, best first.

    Rows are scaled to length 1, a block at a time, so vectors may be memory-mapped. Blocks are compared by a float32
    product. Scores of documents that its rounding might misplace are computed again, so equal documents tie exactly.

    Raises:
        InputError: if vectors are not finite.
    """
    check_finite(queries_QH)
    queries_QH = unit_rows(queries_QH)
    rankings: Rankings = {query_id: {} for query_id in query_ids}
    for start in range(0, len(document_ids), _DOCUMENTS_PER_BLOCK):
        rows = slice(start, start + _DOCUMENTS_PER_BLOCK)
        for query_id, scores in _rank_block(queries_QH, documents_DH[rows], query_ids, document_ids[rows], top_k):
            candidates = rankings[query_id] | scores
            rankings[query_id] = {document: candidates[document] for document in ordered(candidates)[:top_k]}
    return rankings


def _rank_block(
    queries_QH: Floats, documents_DH: Floats, query_ids: Sequence[str], document_ids: Sequence[str], top_k: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each query with the documents of a block that may be among its ``top_k``."""
    check_finite(documents_DH)
    documents_DH = unit_rows(documents_DH)
    queries_per_block = max(1, _SCORES_PER_BLOCK // max(1, len(document_ids)))
    for start in range(0, len(query_ids), queries_per_block):
        rows = slice(start, start + queries_per_block)
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
) -> Rankings:
    """Score only each query's ``candidates``, document ids by query id, by cosine."""
    rows = {document_id: row for row, document_id in enumerate(document_ids)}
    rankings: Rankings = {}
    check_finite(queries_QH)
    check_finite(documents_DH)
    for query_id, query_H in zip(query_ids, unit_rows(queries_QH), strict=True):
        chosen = list(candidates.get(query_id, ()))
        scores = cosines(query_H, unit_rows(documents_DH[[rows[document_id] for document_id in chosen]]))
        rankings[query_id] = dict(zip(chosen, scores.tolist(), strict=True))
    return rankings


def ordered(scores: Mapping[str, float]) -> list[str]:
    """Return document ids best first as trec_eval orders them: by float32 score, then by id, both descending."""
    return sorted(scores, key=lambda document: (float(np.float32(scores[document])), document), reverse=True)
