"""Isotropy: how evenly vectors fill their space.

Axes: N pairs, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorembed.errors import InputError

Floats = NDArray[np.floating[Any]]

_COSINES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Isotropy:
    """How embeddings are spread; all figures but ``alignment`` are over documents.

    ``mean_cosine`` is over all pairs of different texts. ``effective_rank`` is the exponential of the entropy of the
    singular values, divided by their sum, of the unit vectors, not centred (Roy & Vetterli 2007): 1 to min(N, H).
    ``alignment`` is the mean squared distance of unit positive pairs, and ``uniformity`` the logarithm of the mean of
    exp(-2 d^2) over all pairs of documents (Wang & Isola 2020); both are better when lower.
    """

    mean_cosine: float
    effective_rank: float
    alignment: float
    uniformity: float


def isotropy(queries_NH: Floats, documents_NH: Floats) -> Isotropy:
    """Measure the spread of N positive pairs' vectors of any length; row i of both makes pair i.

    Raises:
        ValueError: for fewer than two pairs, or unequal shapes.
        InputError: if a vector is zero or not finite.
    """
    if queries_NH.shape != documents_NH.shape or len(documents_NH) < 2:
        raise ValueError(f"{queries_NH.shape} queries and {documents_NH.shape} documents: give two or more pairs")
    queries_NH, documents_NH = _unit(queries_NH), _unit(documents_NH)
    count = len(documents_NH)
    total_H = documents_NH.sum(axis=0)
    return Isotropy(
        mean_cosine=float((total_H @ total_H - count) / (count * (count - 1))),
        effective_rank=_effective_rank(documents_NH),
        alignment=float(((queries_NH - documents_NH) ** 2).sum(axis=1).mean()),
        uniformity=_uniformity(documents_NH),
    )


def _unit(vectors_NH: Floats) -> Floats:
    lengths_N = np.linalg.norm(vectors_NH.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths_N) & (lengths_N > 0)).all():
        raise InputError(
            "model: it gives a vector that is zero or not finite and has no direction. Its weights are damaged; use "
            "another checkpoint."
        )
    return np.asarray(vectors_NH / lengths_N)


def _effective_rank(units_NH: Floats) -> float:
    values = np.linalg.svd(units_NH, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _uniformity(units_NH: Floats) -> float:
    """Log mean exp(-2 d^2) over i < j, with d^2 = 2 - 2 cos, a block of rows at a time."""
    count, total = len(units_NH), 0.0
    rows = max(1, _COSINES_AT_ONCE // count)
    for start in range(0, count, rows):
        rest_NH = units_NH[start:]
        cosines = rest_NH[:rows] @ rest_NH.T
        total += float(np.triu(np.exp(4 * cosines - 4), k=1).sum())
    return float(np.log(2 * total / (count * (count - 1))))
