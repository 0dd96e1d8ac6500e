"""Metrics against numbers worked out by hand, ties against trec_eval itself, chance against simulation."""

from math import log2

import numpy as np
import pytest
import pytrec_eval
from scipy.stats import spearmanr

from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import METRICS, chance, pseudo_values
from anchorembed.evaluate.task_types import ranking_metrics
from collections_made import collection, scored


def test_graded_ndcg_has_linear_gains() -> None:
    run = {"q": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}}
    qrels = {"q": {"b": 3, "d": 1, "c": 0, "z": 2}}
    scores = scored(run, qrels)["q"]
    # b (3) second and d (1) fourth; ideal is 3, 2, 1; exponential gains would give 0.512
    assert scores["nDCG@10"] == pytest.approx((3 / log2(3) + 1 / log2(5)) / (3 + 2 / log2(3) + 1 / log2(4)))
    assert scores["MRR@10"] == pytest.approx(1 / 2)
    assert scores["Recall@100"] == pytest.approx(2 / 3)


def test_metrics_stop_at_their_cuts() -> None:
    def found_at(place: int) -> dict[str, float]:
        run = {"q": {f"x{number:03}": 1 - number / 1000 for number in range(1, 200)}}
        return scored(run, {"q": {f"x{place:03}": 1}})["q"]

    assert found_at(10) == pytest.approx({"nDCG@10": 1 / log2(11), "MRR@10": 1 / 10, "Recall@100": 1})
    assert found_at(11) == {"nDCG@10": 0, "MRR@10": 0, "Recall@100": 1}
    assert found_at(100)["Recall@100"] == 1
    assert found_at(101)["Recall@100"] == 0


def test_every_judged_query_counts_and_no_other() -> None:
    run = {"found": {"a": 1.0}, "unjudged": {"a": 1.0}, "empty": {}}
    qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"a": 1}, "nothing relevant": {"a": 0}}
    nothing, all_right = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 1.0)
    assert scored(run, qrels) == dict.fromkeys(qrels, nothing) | {"found": all_right}
    assert scored({}, qrels) == dict.fromkeys(qrels, nothing)
    means = ranking_metrics(run, qrels, "ndcg_at_10").values
    assert [means[name] for name in METRICS.values()] == [0.25] * 3


def test_grade_zero_and_below_is_not_relevant() -> None:
    scores = scored({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"a": 0, "b": -1, "c": 1}})["q"]
    assert scores == pytest.approx({"nDCG@10": 1 / log2(4), "MRR@10": 1 / 3, "Recall@100": 1})


def test_ties_put_the_larger_id_first_in_every_metric() -> None:
    scores = scored({"q": {"a": 0.5, "b": 0.5, "c": 0.5}}, {"q": {"b": 1}})["q"]
    assert scores == pytest.approx({"nDCG@10": 1 / log2(3), "MRR@10": 1 / 2, "Recall@100": 1})
    top = scored({"q": {"a": 0.5, "b": 0.5}}, {"q": {"b": 1}})["q"]
    assert top == {"nDCG@10": 1, "MRR@10": 1, "Recall@100": 1}


def test_scores_closer_than_single_precision_are_ties() -> None:
    assert scored({"q": {"a": 1 + 1e-9, "b": 1.0}}, {"q": {"a": 1}})["q"]["MRR@10"] == 0.5
    assert scored({"q": {"a": 1 + 1e-6, "b": 1.0}}, {"q": {"a": 1}})["q"]["MRR@10"] == 1


def test_scores_are_those_of_trec_eval_itself() -> None:
    rng = np.random.default_rng(0)
    documents = [*(f"d{number}" for number in range(150)), "é", "\uffff", "\U0001f98a", "Z", "a'b"]
    run, qrels = {}, {}
    for query in map(str, range(60)):
        found = rng.permutation(documents)[:120].tolist()
        run[query] = {name: float(rng.integers(1, 6)) / 5 + 1e-9 * float(rng.random()) for name in found}
        qrels[query] = {str(name): int(rng.integers(0, 4)) for name in rng.permutation(documents)[:12]}
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100"}).evaluate(run)
    ours = scored(run, qrels)
    for query, expected in trec.items():
        first = expected["recip_rank"]
        assert ours[query]["nDCG@10"] == pytest.approx(expected["ndcg_cut_10"])
        assert ours[query]["Recall@100"] == pytest.approx(expected["recall_100"])
        assert ours[query]["MRR@10"] == pytest.approx(first if first > 1 / 10.5 else 0)


def test_no_judgement_is_refused() -> None:
    with pytest.raises(InputError, match="no judged queries"):
        scored({"q": {"a": 1.0}}, {})


def test_chance_by_hand() -> None:
    expected = chance(collection("ab", {"q": {"a": 2}}))
    assert expected == pytest.approx({"nDCG@10": (1 + 1 / log2(3)) / 2, "MRR@10": 3 / 4, "Recall@100": 1})
    every = chance(collection("abc", {"q": dict.fromkeys("abc", 1)}))
    assert every == pytest.approx({"nDCG@10": 1, "MRR@10": 1, "Recall@100": 1})


@pytest.mark.parametrize("size", [6, pytest.param(230, marks=pytest.mark.slow)])
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
        scores = scored(run, qrels).values()
        seen.append([sum(of_query[name] for of_query in scores) / len(qrels) for name in METRICS])
    errors = np.std(seen, axis=0) / np.sqrt(draws)
    expected = chance(collection(names, qrels))
    assert list(expected) == list(METRICS)
    np.testing.assert_array_less(np.abs(np.mean(seen, axis=0) - list(expected.values())), 4 * errors + 1e-9)


def test_pseudo_values_average_to_spearman() -> None:
    """By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4; without the last pair 1, 2.5, 2.5 against 1, 2, 3."""
    values = pseudo_values([0, 1, 1, 5], [0.1, 0.2, 0.3, 0.4])
    assert values.mean() == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    without = [spearmanr(np.delete([0, 1, 1, 5], i), np.delete([0.1, 0.2, 0.3, 0.4], i)).statistic for i in range(4)]
    np.testing.assert_allclose(values - values.mean(), 3 * (np.mean(without) - without))
    assert np.isnan(pseudo_values([1, 1, 1], [0.1, 0.2, 0.3])).all()


@pytest.mark.slow
def test_pseudo_values_spread_as_the_correlation_does() -> None:
    """400 samples of 100 pairs of numbers that correlate by 0.8: their own spread is the one seen in each."""
    rng = np.random.default_rng(0)
    first_RN, noise_RN = rng.normal(size=(2, 400, 100))
    second_RN = 0.8 * first_RN + 0.6 * noise_RN
    samples = [pseudo_values(first, second) for first, second in zip(first_RN, second_RN, strict=True)]
    seen = np.std([values.mean() for values in samples])
    said = np.mean([values.std() / np.sqrt(len(values)) for values in samples])
    assert said == pytest.approx(seen, rel=0.1)
