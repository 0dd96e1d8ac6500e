"""Isotropy against numbers worked out by hand."""

from math import exp, log, sqrt

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.evaluate import isotropy as module
from anchorembed.evaluate.isotropy import Isotropy, isotropy


def values(measured: Isotropy) -> tuple[float, ...]:
    return (measured.mean_cosine, measured.effective_rank, measured.alignment, measured.uniformity)


def test_orthonormal_rows() -> None:
    rows = np.eye(4, 6)
    # squared distances are all 2, so uniformity is log exp(-4)
    assert values(isotropy(rows, 3 * rows)) == pytest.approx((0, 4, 0, -4), abs=1e-12)


def test_identical_rows() -> None:
    rows = np.tile([3.0, 4.0], (5, 1))
    assert values(isotropy(-rows, rows)) == pytest.approx((1, 1, 4, 0), abs=1e-9)


def test_three_rows_by_hand() -> None:
    documents = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    shares = [sqrt(2) / (sqrt(2) + 1), 1 / (sqrt(2) + 1)]
    rank = exp(-sum(share * log(share) for share in shares))
    expected = (1 / 3, rank, (0 + 2 + 4) / 3, log((1 + 2 * exp(-4)) / 3))
    assert values(isotropy(queries, documents)) == pytest.approx(expected)


def test_isotropy_in_blocks_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = np.random.default_rng(6).normal(size=(2, 33, 7)).astype(np.float32)
    monkeypatch.setattr(module, "_COSINES_AT_ONCE", 100)
    units = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    pairs = [(units[i], units[j]) for i in range(33) for j in range(i)]
    measured = isotropy(queries, documents)
    assert measured.mean_cosine == pytest.approx(np.mean([a @ b for a, b in pairs]), abs=1e-6)
    assert measured.uniformity == pytest.approx(
        log(np.mean([exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs])), abs=1e-5
    )


@pytest.mark.parametrize(
    ("queries", "documents"),
    [(np.ones((1, 2)), np.ones((1, 2))), (np.ones((2, 2)), np.ones((3, 2)))],
)
def test_isotropy_needs_pairs(queries: np.ndarray, documents: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two or more pairs"):
        isotropy(queries, documents)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_isotropy_needs_directions(bad: float) -> None:
    with pytest.raises(InputError, match=r"no direction.*use another checkpoint"):
        isotropy(np.ones((2, 2)), np.array([[1.0, 1.0], [bad, bad]]))
