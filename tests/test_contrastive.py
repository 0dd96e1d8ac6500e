"""InfoNCE against numbers computed by hand; a positive never counts as a negative."""

import math

import pytest
import torch

from anchorembed.contrastive import false_negatives, info_nce, similarities


def test_hand_computed() -> None:
    queries = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    documents = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -1.0]])
    # cosines: query 0: 1, 0.6, 0; query 1: 0, 0.8, -1
    first = -math.log(math.exp(2.0) / (math.exp(2.0) + math.exp(1.2) + 1))
    second = -math.log(math.exp(1.6) / (1 + math.exp(1.6) + math.exp(-2.0)))
    loss = info_nce(queries, documents, torch.tensor([0, 1]), scale=2.0)
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)


def test_excluded_documents_do_not_count() -> None:
    queries, documents = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    excluded = torch.tensor([[False, False, True], [False, False, False]])
    loss = info_nce(queries, documents, torch.tensor([0, 1]), 1.0, excluded)
    first = -math.log(math.e / (math.e + 1))
    second = -math.log(math.e / (math.e + 2))
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)


def test_a_duplicate_positive_is_no_negative() -> None:
    found = false_negatives(["a", "b", "a"], ["x", "y", "z", "x", "y"], [0, 1, 2])
    assert found.tolist() == [
        [False, False, True, True, False],  # query a: x (its own and its copy) and z answer it
        [False, False, False, False, True],
        [True, False, False, True, False],
    ]


def test_cosines_stay_float32_under_autocast() -> None:
    queries, documents = torch.randn(4, 64), torch.randn(6, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(queries.bfloat16(), documents.bfloat16())
        assert (queries @ documents.T).dtype == torch.bfloat16  # what would happen without care
    assert found.dtype == torch.float32
    assert len(found.unique()) == 24
