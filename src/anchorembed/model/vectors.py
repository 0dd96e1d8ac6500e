"""Unit vectors and their cosines with NumPy alone: the same score for a pair wherever it stands.

Search, evaluation, mining and the vector cache all compare vectors; what they share is here.

Axes: N texts, D documents, H hidden size.
"""

from collections.abc import Iterable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Side = Literal["query", "document"]
Floats = NDArray[np.float32]

_ROWS_PER_COSINE = 4096


class Encoder(Protocol):
    """What a search needs of a model: texts to vectors, and a name for the weights that made them."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever the vectors would."""

    @property
    def dimension(self) -> int:
        """H, the length of a vector."""

    def encode(self, texts: Iterable[str], side: Side = "document") -> Floats:
        """Return one vector per text, in order, float32 [N, H]."""


def unit_rows(vectors_NH: Floats) -> Floats:
    """Scale each row to length 1, float32 [N, H]; a zero row stays zero and so has cosine 0 with everything."""
    lengths = np.linalg.norm(vectors_NH, axis=1, keepdims=True)
    units_NH: Floats = np.divide(vectors_NH, lengths, out=np.zeros_like(vectors_NH), where=lengths > 0)
    return units_NH


def cosines(query_H: Floats, documents_DH: Floats) -> Floats:
    """Dot products of unit vectors, float32 [D], each the same wherever its document stands.

    A matrix product may round the same pair differently in different positions, which would split ties; here every row
    is summed by itself in float64 and rounded once.
    """
    scores = np.empty(len(documents_DH), np.float32)
    for start in range(0, len(documents_DH), _ROWS_PER_COSINE):
        part = slice(start, start + _ROWS_PER_COSINE)
        scores[part] = np.multiply(documents_DH[part], query_H, dtype=np.float64).sum(axis=1)
    return scores


def rounding(dimension: int) -> float:
    """Bound on how far float32 rounding can move the difference of two dot products of unit vectors."""
    return 2 * (dimension + 8) * 2.0**-24


def near_top(scores_D: Floats, top_k: int, margin: float) -> NDArray[np.intp]:
    """Rows, in their order, whose score may, within ``margin``, belong to the ``top_k`` best; int [at least top_k]."""
    if top_k >= len(scores_D):
        return np.arange(len(scores_D))
    last = np.partition(scores_D, len(scores_D) - top_k)[len(scores_D) - top_k]
    return np.flatnonzero(scores_D >= last - margin)
