"""Rankings against exact cosines, whatever the order of documents; ties at the cut fall as trec_eval breaks them."""

from math import log2

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.evaluate import ranking
from anchorembed.evaluate.ranking import ordered, rank
from anchorembed.model.vectors import cosines, unit_rows
from collections_made import scored


def test_rank_returns_the_largest_cosines_best_first() -> None:
    rng = np.random.default_rng(1)
    queries_QH = rng.standard_normal((9, 16)).astype(np.float32)
    documents_DH = rng.standard_normal((400, 16)).astype(np.float32)
    run = rank(queries_QH, documents_DH, [f"q{row}" for row in range(9)], [f"d{row}" for row in range(400)], 20)
    for row in range(9):
        exact = documents_DH.astype(np.float64) @ queries_QH[row]
        exact /= np.linalg.norm(documents_DH, axis=1) * np.linalg.norm(queries_QH[row])
        best = np.argsort(-exact)[:20]
        assert list(run[f"q{row}"]) == [f"d{place}" for place in best]
        assert list(run[f"q{row}"].values()) == pytest.approx(exact[best].tolist(), abs=1e-6)


def test_rank_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    queries_QH, documents_DH = rng.standard_normal((10, 8)), rng.standard_normal((50, 8))
    names = [f"q{row}" for row in range(10)], [f"d{row}" for row in range(50)]
    whole = rank(queries_QH.astype(np.float32), documents_DH.astype(np.float32), *names, 7)
    monkeypatch.setattr(ranking, "_SCORES_PER_BLOCK", 150)
    assert rank(queries_QH.astype(np.float32), documents_DH.astype(np.float32), *names, 7) == whole


@pytest.mark.parametrize("seed", range(3))
def test_order_of_documents_changes_nothing_when_all_are_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"d{number:04}" for number in range(1003)]  # not a multiple of any kernel's width
    vector = np.random.default_rng(9).standard_normal(37).astype(np.float32)
    shuffled = [names[place] for place in rng.permutation(len(names))]
    query_QH = np.random.default_rng(8).standard_normal((1, 37)).astype(np.float32)
    run = rank(query_QH, np.tile(vector, (len(names), 1)), ["q"], shuffled)
    assert list(run["q"]) == names[:-101:-1]
    assert len(set(run["q"].values())) == 1
    scores = scored(run, {"q": {"d1000": 2, "d0950": 1, "d0001": 1}})["q"]
    ideal = 2 + 1 / log2(3) + 1 / log2(4)
    assert scores == pytest.approx({"nDCG@10": 2 / log2(4) / ideal, "MRR@10": 1 / 3, "Recall@100": 2 / 3})


@pytest.mark.parametrize("seed", range(3))
def test_order_of_documents_changes_nothing_with_ties_at_the_cut(seed: int) -> None:
    base = np.random.default_rng(3)
    vectors = np.repeat(base.standard_normal((40, 24)).astype(np.float32), 25, axis=0)
    names = [f"d{number}" for number in range(len(vectors))]
    queries_QH = base.standard_normal((5, 24)).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(names))
    run = rank(queries_QH, vectors, list("abcde"), names, 110)
    shuffled = rank(queries_QH, vectors[order], list("abcde"), [names[place] for place in order], 110)
    assert [(query, list(found.items())) for query, found in shuffled.items()] == [
        (query, list(found.items())) for query, found in run.items()
    ]
    # The cut through the last group of equals is the one scoring would make of the whole ranking.
    qrels = {query: {name: 1 for name in names[::3]} for query in "abcde"}
    assert scored(run, qrels) == scored(rank(queries_QH, vectors, list("abcde"), names, 1000), qrels)


def test_rounding_of_the_product_cannot_misplace_the_cut() -> None:
    rng = np.random.default_rng(6)
    vectors = (rng.standard_normal(300) + 1e-6 * rng.standard_normal((800, 300))).astype(np.float32)
    query_H = rng.standard_normal(300).astype(np.float32)
    names = [f"d{number}" for number in range(800)]
    exact = cosines(unit_rows(query_H[None])[0], unit_rows(vectors)).tolist()
    whole = dict(zip(names, exact, strict=True))
    for top_k in (1, 10, 100):
        run = rank(query_H[None], vectors, ["q"], names, top_k)
        assert list(run["q"].items()) == [(name, whole[name]) for name in ordered(whole)[:top_k]]


def test_fewer_documents_than_the_cut_are_all_ranked() -> None:
    run = rank(np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32), ["q"], ["a", "b"])
    assert list(run["q"]) == ["b", "a"]


def test_rank_names_what_it_cannot_rank() -> None:
    ones = np.ones((1, 2), np.float32)
    with pytest.raises(InputError, match="not finite"):
        rank(ones, ones * np.nan, ["q"], ["a"])
