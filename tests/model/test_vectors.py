"""Cosines that do not depend on places, and the rows that may be among the best."""

import numpy as np

from anchorembed.model.vectors import cosines, near_top, rounding, unit_rows


def test_unit_rows_have_length_one_and_zero_stays_zero() -> None:
    units_NH = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 0.0]], np.float32))
    np.testing.assert_allclose(units_NH, [[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]], rtol=1e-7)
    assert units_NH.dtype == np.float32


def test_a_cosine_does_not_depend_on_where_its_document_stands() -> None:
    rng = np.random.default_rng(0)
    documents_DH = unit_rows(rng.standard_normal((5000, 33)).astype(np.float32))
    query_H = documents_DH[0]
    scores, order = cosines(query_H, documents_DH), rng.permutation(5000)
    np.testing.assert_array_equal(cosines(query_H, documents_DH[order]), scores[order])
    np.testing.assert_array_equal(cosines(query_H, documents_DH[4999:]), scores[4999:])
    np.testing.assert_allclose(scores, documents_DH @ query_H, atol=1e-6)


def test_a_float32_product_stays_within_the_rounding_bound() -> None:
    rng = np.random.default_rng(0)
    documents_DH = unit_rows(rng.standard_normal((2000, 64)).astype(np.float32))
    errors = np.abs(documents_DH @ documents_DH[0] - cosines(documents_DH[0], documents_DH))
    assert 2 * errors.max() <= rounding(64)


def test_near_top_keeps_what_the_margin_could_lift() -> None:
    scores_D = np.array([0.1, 0.9, 0.5, 0.49, 0.5], np.float32)
    assert near_top(scores_D, 1, 0.0).tolist() == [1]
    assert near_top(scores_D, 2, 0.0).tolist() == [1, 2, 4]  # equal scores stay together
    assert near_top(scores_D, 2, 0.02).tolist() == [1, 2, 3, 4]
    assert near_top(scores_D, 9, 0.0).tolist() == [0, 1, 2, 3, 4]
