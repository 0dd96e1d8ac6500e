"""The map of vectors is a projection on principal axes."""

import numpy as np
import pytest

from anchorembed.page.vector_map import vector_map

TEXTS = [(f"query {number}", f"document {number}") for number in range(4)]


def test_the_map_keeps_what_a_plane_holds() -> None:
    """Points of a plane in five dimensions keep their distances, up to the signs, which are fixed."""
    rng = np.random.default_rng(0)
    plane_2H = np.linalg.qr(rng.normal(size=(5, 2)))[0].T
    points_N2 = rng.normal(size=(8, 2))
    vectors_NH = (points_N2 @ plane_2H + 3).astype(np.float32)
    made = vector_map(TEXTS, vectors_NH[:4], vectors_NH[4:])
    drawn_N2 = np.array(made.queries + made.documents)
    for first in range(8):
        distances = np.linalg.norm(drawn_N2 - drawn_N2[first], axis=1)
        assert distances == pytest.approx(np.linalg.norm(points_N2 - points_N2[first], axis=1), abs=1e-5)
    assert made.share == pytest.approx(1)
    assert made.texts[2] == ("query 2", "document 2")
    assert made == vector_map(TEXTS, vectors_NH[:4], vectors_NH[4:])
    assert vector_map(TEXTS, np.eye(8)[:4], np.eye(8)[4:]).share == pytest.approx(2 / 7)
    assert vector_map(TEXTS, np.ones((4, 8)), np.ones((4, 8))).share == 0
