"""Unit vectors and their cosines with NumPy: a cosine does not depend on the rows in which its vectors are.

Axes: N texts, D documents, H hidden size.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anchorembed.errors import InputError

Side = Literal["query", "document"]
Floats = NDArray[np.float32]

_DOCUMENTS_AT_ONCE = 4096


def check_finite(vectors_NH: Floats) -> None:
    """Raise InputError if a vector has a coordinate that is nan or infinite."""
    if not np.isfinite(vectors_NH).all():
        raise InputError(
            "model: it gives vectors that are not finite. Its weights are damaged; use another checkpoint."
        )


def unit_rows(vectors_NH: Floats) -> Floats:
    """Scale each row to length 1, float32 [N, H]; a zero row stays zero, so its cosines are 0."""
    lengths = np.linalg.norm(vectors_NH, axis=1, keepdims=True)
    units_NH: Floats = np.divide(vectors_NH, lengths, out=np.zeros_like(vectors_NH), where=lengths > 0)
    return units_NH


def cosines(query_H: Floats, documents_DH: Floats) -> Floats:
    """Dot products of unit vectors, float32 [D], each independent of where its document is.

    A matrix product may round equal rows differently, which would break ties by position. Here each row is summed by
    itself in float64 and rounded once.
    """
    scores = np.empty(len(documents_DH), np.float32)
    for start in range(0, len(documents_DH), _DOCUMENTS_AT_ONCE):
        part = slice(start, start + _DOCUMENTS_AT_ONCE)
        scores[part] = np.multiply(documents_DH[part], query_H, dtype=np.float64).sum(axis=1)
    return scores


def rounding(dimension: int) -> float:
    """Largest error, by rounding to float32, of the difference between two dot products of unit vectors."""
    return 2 * (dimension + 8) * 2.0**-24


def near_top(scores_D: Floats, top_k: int, margin: float) -> NDArray[np.intp]:
    """Indices, ascending, of scores at most ``margin`` below the ``top_k``-th best; all if there are fewer."""
    if top_k >= len(scores_D):
        return np.arange(len(scores_D))
    last = np.partition(scores_D, len(scores_D) - top_k)[len(scores_D) - top_k]
    return np.flatnonzero(scores_D >= last - margin)
