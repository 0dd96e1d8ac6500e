"""Metrics against numbers worked out by hand, ties against trec_eval itself, chance against simulation."""

from collections.abc import Iterable
from math import log2

import numpy as np
import pytest
import pytrec_eval

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.errors import InputError
from anchorembed.evaluate import ranking as evaluation
from anchorembed.evaluate.ranking import METRICS, chance, evaluate_collection, ordered, rank, score_run, subset
from anchorembed.search.index import Floats, Side, cosines, unit_rows


class Table:
    """An encoder that looks each text's vector up, apart for queries and documents."""

    fingerprint = "table"
    dimension = 2

    def __init__(self, queries: dict[str, list[float]], documents: dict[str, list[float]]) -> None:
        self.vectors: dict[Side, dict[str, list[float]]] = {"query": queries, "document": documents}

    def encode(self, texts: Iterable[str], side: Side = "document") -> Floats:
        return np.array([self.vectors[side][text] for text in texts], np.float32)


def collection(documents: Iterable[str], qrels: dict[str, dict[str, int]]) -> Collection:
    return Collection(
        "made",
        tuple(Document(name, f"text {name}") for name in documents),
        tuple(Document(name, f"text {name}") for name in qrels),
        qrels,
    )


def test_graded_ndcg_has_linear_gains() -> None:
    run = {"q": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}}
    qrels = {"q": {"b": 3, "d": 1, "c": 0, "z": 2}}
    scores = score_run(run, qrels).per_query["q"]
    # b (3) second and d (1) fourth; ideal is 3, 2, 1; exponential gains would give 0.512
    assert scores["nDCG@10"] == pytest.approx((3 / log2(3) + 1 / log2(5)) / (3 + 2 / log2(3) + 1 / log2(4)))
    assert scores["MRR@10"] == pytest.approx(1 / 2)
    assert scores["Recall@100"] == pytest.approx(2 / 3)


def test_metrics_stop_at_their_cuts() -> None:
    def found_at(place: int) -> dict[str, float]:
        run = {"q": {f"x{number:03}": 1 - number / 1000 for number in range(1, 200)}}
        return score_run(run, {"q": {f"x{place:03}": 1}}).mean

    assert found_at(10) == pytest.approx({"nDCG@10": 1 / log2(11), "MRR@10": 1 / 10, "Recall@100": 1})
    assert found_at(11) == {"nDCG@10": 0, "MRR@10": 0, "Recall@100": 1}
    assert found_at(100)["Recall@100"] == 1
    assert found_at(101)["Recall@100"] == 0


def test_every_judged_query_counts_and_no_other() -> None:
    run = {"found": {"a": 1.0}, "unjudged": {"a": 1.0}, "empty": {}}
    qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"a": 1}, "nothing relevant": {"a": 0}}
    scores = score_run(run, qrels)
    assert scores.mean == {"nDCG@10": 0.25, "MRR@10": 0.25, "Recall@100": 0.25}
    assert set(scores.per_query) == set(qrels)
    assert scores.per_query["missing"] == dict.fromkeys(METRICS, 0.0)
    assert score_run({}, qrels).mean == dict.fromkeys(METRICS, 0.0)


def test_grade_zero_and_below_is_not_relevant() -> None:
    scores = score_run({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"a": 0, "b": -1, "c": 1}}).mean
    assert scores == pytest.approx({"nDCG@10": 1 / log2(4), "MRR@10": 1 / 3, "Recall@100": 1})


def test_ties_put_the_larger_id_first_in_every_metric() -> None:
    scores = score_run({"q": {"a": 0.5, "b": 0.5, "c": 0.5}}, {"q": {"b": 1}}).mean
    assert scores == pytest.approx({"nDCG@10": 1 / log2(3), "MRR@10": 1 / 2, "Recall@100": 1})
    top = score_run({"q": {"a": 0.5, "b": 0.5}}, {"q": {"b": 1}}).mean
    assert top == {"nDCG@10": 1, "MRR@10": 1, "Recall@100": 1}


def test_scores_closer_than_single_precision_are_ties() -> None:
    assert score_run({"q": {"a": 1 + 1e-9, "b": 1.0}}, {"q": {"a": 1}}).mean["MRR@10"] == 0.5
    assert score_run({"q": {"a": 1 + 1e-6, "b": 1.0}}, {"q": {"a": 1}}).mean["MRR@10"] == 1


def test_scores_are_those_of_trec_eval_itself() -> None:
    rng = np.random.default_rng(0)
    documents = [*(f"d{number}" for number in range(150)), "é", "\uffff", "\U0001f98a", "Z", "a'b"]
    run, qrels = {}, {}
    for query in map(str, range(60)):
        found = rng.permutation(documents)[:120].tolist()
        run[query] = {name: float(rng.integers(1, 6)) / 5 + 1e-9 * float(rng.random()) for name in found}
        qrels[query] = {str(name): int(rng.integers(0, 4)) for name in rng.permutation(documents)[:12]}
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100"}).evaluate(run)
    ours = score_run(run, qrels).per_query
    for query, expected in trec.items():
        first = expected["recip_rank"]
        assert ours[query]["nDCG@10"] == pytest.approx(expected["ndcg_cut_10"])
        assert ours[query]["Recall@100"] == pytest.approx(expected["recall_100"])
        assert ours[query]["MRR@10"] == pytest.approx(first if first > 1 / 10.5 else 0)


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
    monkeypatch.setattr(evaluation, "_SCORES_PER_BLOCK", 150)
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
    scores = score_run(run, {"q": {"d1000": 2, "d0950": 1, "d0001": 1}}).mean
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
    assert score_run(run, qrels) == score_run(rank(queries_QH, vectors, list("abcde"), names, 1000), qrels)


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
    with pytest.raises(InputError, match="top_k: 0"):
        rank(ones, ones, ["q"], ["a"], 0)
    with pytest.raises(ValueError, match="1 document vectors for 2 ids"):
        rank(ones, ones, ["q"], ["a", "b"])


def test_evaluating_a_collection_embeds_each_side_as_itself() -> None:
    made = collection(["a", "b", "q"], {"q": {"q": 1}, "p": {"a": 1}})
    documents = {"text a": [1.0, 0.0], "text b": [0.6, 0.8], "text q": [0.0, 9.0]}
    scores = evaluate_collection(Table({"text q": [0.0, 1.0], "text p": [0.0, 5.0]}, documents), made)
    # A document with the query's own id stays: q finds itself first. p finds a last, behind q and b.
    assert scores.per_query["q"] == {"nDCG@10": 1, "MRR@10": 1, "Recall@100": 1}
    assert scores.per_query["p"] == pytest.approx({"nDCG@10": 1 / log2(4), "MRR@10": 1 / 3, "Recall@100": 1})
    assert scores.mean["MRR@10"] == pytest.approx(2 / 3)


def test_evaluating_needs_depth_queries_and_documents() -> None:
    encoder = Table({"text q": [0.0, 1.0]}, {"text a": [1.0, 0.0]})
    with pytest.raises(InputError, match="top_k: 99"):
        evaluate_collection(encoder, collection(["a"], {"q": {"a": 1}}), 99)
    for empty in (collection([], {"q": {"a": 1}}), collection(["a"], {})):
        with pytest.raises(InputError, match="no judged query or no document"):
            evaluate_collection(encoder, empty)
        with pytest.raises(InputError, match="no judged query or no document"):
            chance(empty)
    with pytest.raises(InputError, match="no judged queries"):
        score_run({"q": {"a": 1.0}}, {})


def test_chance_by_hand() -> None:
    expected = chance(collection("ab", {"q": {"a": 2}}))
    assert expected == pytest.approx({"nDCG@10": (1 + 1 / log2(3)) / 2, "MRR@10": 3 / 4, "Recall@100": 1})
    every = chance(collection("abc", {"q": dict.fromkeys("abc", 1)}))
    assert every == pytest.approx({"nDCG@10": 1, "MRR@10": 1, "Recall@100": 1})


@pytest.mark.parametrize("size", [6, 230])
def test_chance_is_the_mean_of_random_rankings(size: int) -> None:
    names = [f"d{number}" for number in range(size)]
    qrels = {
        "graded": {names[0]: 3, names[1]: 1, names[2]: 1, names[3]: 0},
        "many": dict.fromkeys(names[: size // 2], 1),
        "lost": {names[0]: 2, "not in the corpus": 1},
        "none": {names[0]: 0},
    }
    rng, draws = np.random.default_rng(4), 1500
    seen = []
    for _ in range(draws):
        run = {query: dict(zip(names, rng.random(size).tolist(), strict=True)) for query in qrels}
        seen.append(list(score_run(run, qrels).mean.values()))
    errors = np.std(seen, axis=0) / np.sqrt(draws)
    expected = chance(collection(names, qrels))
    assert list(expected) == list(METRICS)
    np.testing.assert_array_less(np.abs(np.mean(seen, axis=0) - list(expected.values())), 4 * errors + 1e-9)


def big() -> Collection:
    rng = np.random.default_rng(5)
    names = [f"d{number}" for number in range(400)]
    qrels = {}
    for query in range(60):
        judged = rng.permutation(names)[: rng.integers(2, 9)].tolist()
        qrels[f"q{query}"] = {str(name): int(place > 0) for place, name in enumerate(judged)}
    return collection(names, qrels)


def test_subset_keeps_whole_queries() -> None:
    full = big()
    small = subset(full, 80)
    ids = {document.id for document in small.documents}
    assert len(small.documents) == 80
    assert [document for document in full.documents if document.id in ids] == list(small.documents)
    assert {query.id for query in small.queries} == set(small.qrels)
    assert len(small.queries) >= 10
    for query in full.queries:
        relevant = {name for name, grade in full.qrels[query.id].items() if grade > 0}
        assert (query in small.queries) == (relevant <= ids)
        if query in small.queries:
            assert small.qrels[query.id] == {k: v for k, v in full.qrels[query.id].items() if k in ids}


def test_subset_depends_on_ids_and_seed_alone() -> None:
    full = big()
    turned = Collection(full.name, full.documents[::-1], full.queries[::-1], dict(reversed(list(full.qrels.items()))))
    small = subset(full, 80)
    assert set(subset(turned, 80).documents) == set(small.documents)
    assert subset(turned, 80).qrels == small.qrels
    assert set(subset(full, 80, seed=1).documents) != set(small.documents)


def test_subset_is_the_same_on_every_machine() -> None:
    made = collection([f"d{number}" for number in range(30)], {"p": {"d1": 1, "d2": 2}, "q": {"d3": 1}})
    assert [document.id for document in subset(made, 6).documents] == ["d1", "d2", "d3", "d7", "d21", "d28"]


def test_subset_of_everything_and_of_too_little() -> None:
    full = big()
    assert subset(full, 9999).documents == full.documents
    assert subset(full, 9999).qrels == full.qrels
    with pytest.raises(InputError, match="documents: 0"):
        subset(full, 0)
    with pytest.raises(InputError, match="no query has all its relevant documents in 1"):
        subset(collection("abc", {"q": {"a": 1, "b": 1}}), 1)
