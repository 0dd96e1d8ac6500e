"""The map of vectors: pairs on the two axes along which their vectors differ most. `drawings` draws it."""

from dataclasses import dataclass

import numpy as np

from anchorembed.model.vectors import Floats


@dataclass(frozen=True, slots=True)
class VectorMap:
    """Vectors on their two principal axes: ``queries[i]`` and ``documents[i]`` are a pair.

    ``share`` is the share of the variance along these axes.
    """

    queries: list[tuple[float, float]]
    documents: list[tuple[float, float]]
    texts: list[tuple[str, str]]
    share: float


def vector_map(texts: list[tuple[str, str]], queries_NH: Floats, documents_NH: Floats) -> VectorMap:
    """Pairs of vectors on the two axes along which they differ most (principal components), signs fixed."""
    vectors_NH = np.concatenate([queries_NH, documents_NH]).astype(np.float64)
    vectors_NH -= vectors_NH.mean(0)
    _, singular, axes = np.linalg.svd(vectors_NH, full_matrices=False)
    axes_2H = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes[:2]])
    points = [(float(x), float(y)) for x, y in vectors_NH @ axes_2H.T]
    power = np.square(singular)
    share = float(power[:2].sum() / max(power.sum(), 1e-12))
    return VectorMap(points[: len(texts)], points[len(texts) :], texts, share)
