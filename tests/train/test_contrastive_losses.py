"""InfoNCE against numbers computed by hand; a positive never counts as a negative."""

import math

import pytest
import torch

from anchorembed.data.pairs import TextPair
from anchorembed.recipe_schema import Contrast
from anchorembed.train.contrast import Contrastive, excluded_documents
from anchorembed.train.contrastive_losses import (
    distillation,
    false_negatives,
    has_negatives,
    info_nce,
    scored_documents,
    similarities,
    too_similar,
)
from anchorembed.train.stage import step
from stages import make, ready, stage


def test_hand_computed() -> None:
    queries = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    documents = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -1.0]])
    # cosines: query 0: 1, 0.6, 0; query 1: 0, 0.8, -1
    first = -math.log(math.exp(2.0) / (math.exp(2.0) + math.exp(1.2) + 1))
    second = -math.log(math.exp(1.6) / (1 + math.exp(1.6) + math.exp(-2.0)))
    loss = info_nce(queries, documents, scale=2.0)
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)


def test_excluded_documents_do_not_count() -> None:
    queries, documents = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    excluded = torch.tensor([[False, False, True], [False, False, False]])
    loss = info_nce(queries, documents, 1.0, excluded)
    first = -math.log(math.e / (math.e + 1))
    second = -math.log(math.e / (math.e + 2))
    assert float(loss) == pytest.approx((first + second) / 2, abs=1e-6)


def test_a_duplicate_positive_is_no_negative() -> None:
    found = false_negatives(["a", "b", "a"], ["x", "y", "z", "x", "y"])
    assert found.tolist() == [
        [False, False, True, True, False],  # query a: x (its own and its copy) and z answer it
        [False, False, False, False, True],
        [True, False, False, True, False],
    ]


def test_a_query_is_no_negative_of_itself() -> None:
    """Where both sides are alike: b is asked for, and stands among the documents as a's answer."""
    assert false_negatives(["a", "b"], ["b", "c"]).tolist() == [[False, False], [True, False]]


CHAIN = [TextPair("a", "b", ("x",)), TextPair("b", "c", ("a",)), TextPair("d", "d", ("b",))]


@pytest.mark.parametrize(("query", "document"), [("", ""), ("Find: ", ""), ("Find: ", "Find: "), ("", "Text: ")])
def test_a_query_is_no_negative_of_itself_whatever_is_put_before_it(query: str, document: str) -> None:
    embedder, _ = make("llama")
    pairs = embedder.pairs.tokenize(CHAIN, [query] * 3, [document] * 3)
    wanted = [  # b, c, d, x, a, b
        [False, False, False, False, True, True],  # a: b is its positive
        [True, False, False, False, False, True],  # b
        [False, False, False, False, False, False],  # d, whose positive is itself
    ]
    assert ready(embedder, Contrast()).make_batch(0, pairs).excluded_QD.tolist() == wanted
    joint = stage(embedder, contrast_weight=1.0).make_batch(0, pairs)
    assert joint.excluded_QD is not None
    assert joint.excluded_QD.tolist() == [row[:3] for row in wanted]
    mutual = embedder.pairs.tokenize([TextPair("a", "b"), TextPair("b", "a")], [query] * 2, [document] * 2)
    assert not Contrastive.teaches(Contrast(), mutual)


def test_texts_that_are_equal_once_cut_are_no_negatives() -> None:
    """Of 24 tokens of a query and 40 of a document; a query longer than that is itself by its text."""
    embedder, _ = make("llama")
    query, text = "many words of a query " * 3, "many words of a text " * 9
    texts = [TextPair(f"{query} 1", f"{text} 1"), TextPair(f"{query} 2", f"{text} 2"), TextPair("a", f"{query} 1")]
    pairs = embedder.pairs.tokenize(texts, ["Find: "] * 3)
    assert pairs[0].query == pairs[1].query
    assert pairs[0].document == pairs[1].document
    assert excluded_documents(pairs, 0).tolist() == [[False, True, True], [True, False, False], [False, False, False]]


def test_cosines_stay_float32_under_autocast() -> None:
    queries, documents = torch.randn(4, 64), torch.randn(6, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(queries.bfloat16(), documents.bfloat16())
        assert (queries @ documents.T).dtype == torch.bfloat16  # what would happen without care
    assert found.dtype == torch.float32
    assert len(found.unique()) == 24


def test_what_is_nearer_than_the_positive_is_masked() -> None:
    """Cosines of query 0: 0.6, 0.8, 1 with the first its positive; of query 1: 0.8, 0.6, 0 with the second."""
    queries, documents = torch.eye(2), torch.tensor([[3.0, 4.0], [8.0, 6.0], [1.0, 0.0]])
    expected = [[False, True, True], [True, False, False]]
    assert too_similar(queries, documents, 0.1).tolist() == expected
    assert too_similar(queries, documents, 0.3).tolist() == [[False, False, True], [False, False, False]]
    guide = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert not too_similar(guide, torch.ones(3, 2), 0.0).any()


def test_with_dimensions_it_is_the_mean_over_cut_vectors() -> None:
    embedder, pairs = make("llama")
    queries = embedder.encode_tokens([pair.query for pair in pairs])
    documents = embedder.encode_tokens([pair.document for pair in pairs])
    losses = [info_nce(queries[:, :size], documents[:, :size], 50.0) for size in (8, 32)]
    found = step(ready(embedder, Contrast(dimensions=[8], lora=None, hard_negatives=0)), 0, pairs)
    assert found["loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-5)


def test_distillation_is_the_divergence_from_the_given_scores() -> None:
    """Query 0 has cosines 0.6 and 1 with its candidates; queries 1 (no scores) and 2 (one candidate) teach nothing."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    documents = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0], [5.0, 0.0]])
    found = distillation(queries, documents, scored_documents([[0, 3], [], [2]], [[4.0, 1.0], [], [7.0]]), scale=2.0)
    teacher = 1 / (1 + math.exp(-3.0))
    student = 1 / (1 + math.exp(2.0 - 1.2))
    expected = teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))
    assert float(found) == pytest.approx(expected, abs=1e-6)
    shifted = distillation(
        queries, documents, scored_documents([[0, 3], [], [2]], [[14.0, 11.0], [], [7.0]]), scale=2.0
    )
    assert float(shifted) == pytest.approx(expected, abs=1e-5)
    assert float(distillation(queries, documents, scored_documents([[], [], []], [[], [], []]))) == 0.0


@pytest.mark.parametrize(
    ("queries", "documents", "expected"),
    [
        ("ab", "xy", True),
        ("ab", "xx", False),  # one positive
        ("aa", "xy", False),  # one query
        ("ab", "ba", False),  # each other's query
        ("a", "x", False),
        ("a", "xn", True),  # a hard negative
        ("ab", "xxx", False),
        ("aab", "xyx", True),  # y is a negative of b
    ],
)
def test_a_step_without_negatives_is_known_by_its_texts(queries: str, documents: str, expected: bool) -> None:
    excluded_QD = false_negatives(queries, documents)
    assert has_negatives(excluded_QD) is expected
    positives = list(range(len(queries)))
    excluded_QD[positives, positives] = True
    assert bool((~excluded_QD).any()) is expected
