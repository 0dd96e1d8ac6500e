"""Tests and intervals against exact enumeration and numbers worked out by hand."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from anchorembed.evaluate import statistics as significance
from anchorembed.evaluate.statistics import bootstrap_interval, holm, paired_interval, seeds_interval, sign_flip_p


def by_item(scores_SQ: list[list[float]]) -> dict[str, list[float]]:
    return {f"q{number}": list(scores) for number, scores in enumerate(zip(*scores_SQ, strict=True))}


def test_p_is_near_that_of_all_flips() -> None:
    first, second = np.random.default_rng(1).normal(size=(2, 10)) + np.array([[0.6], [0.0]])
    signs = np.array(list(product([-1, 1], repeat=10)))
    exact = (np.abs(signs @ (first - second)) >= abs((first - second).sum()) - 1e-12).mean()
    assert 0.005 < exact < 0.4
    assert sign_flip_p(by_item([first]), by_item([second])) == pytest.approx(exact, abs=0.015)


def test_ties_with_the_observed_mean_count() -> None:
    # three equal differences: 2 of the 8 patterns of signs are as extreme, whatever rounding does to 0.1 + 0.2
    p = sign_flip_p(by_item([[0.3, 0.3, 0.3]]), by_item([[0.2, 0.2, 0.2]]))
    assert p == pytest.approx(0.25, abs=0.015)
    assert sign_flip_p({"a": [0.1 + 0.2]}, {"a": [0.2]}) == 1  # one item: both signs are as extreme
    assert sign_flip_p(by_item([[0.5, 0.7]]), by_item([[0.5, 0.7]])) == 1


def test_p_is_never_zero() -> None:
    assert sign_flip_p(by_item([[1.0] * 60]), by_item([[0.0] * 60]), flips=999) == 1 / 1000


def test_p_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    found = [sign_flip_p(by_item([a]), by_item([b]), flips=300) for a, b in rng.normal(size=(300, 2, 20))]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_p_averages_seeds_and_pairs_by_id() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random((3, 30)).tolist(), rng.random((2, 30)).tolist()
    p = sign_flip_p(by_item(first), by_item(second))
    assert p == sign_flip_p(by_item([np.mean(first, axis=0)]), by_item([np.mean(second, axis=0)]))
    assert p == sign_flip_p(dict(reversed(by_item(first).items())), by_item(second))
    assert p == sign_flip_p(by_item(second), by_item(first))


def test_many_items_are_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list(significance._blocks(10_000, 10_000))
    assert sum(sizes) == 10_000
    assert max(sizes) * 10_000 <= significance._NUMBERS_PER_BLOCK
    first, second = np.random.default_rng(3).random((2, 40)) + np.array([[0.1], [0.0]])
    whole = sign_flip_p(by_item([first]), by_item([second]))
    monkeypatch.setattr(significance, "_NUMBERS_PER_BLOCK", 300)
    assert sign_flip_p(by_item([first]), by_item([second])) == pytest.approx(whole, abs=0.02)


def test_different_items_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 items .* such as b, c"):
        sign_flip_p({"a": [1.0], "b": [1.0]}, {"a": [1.0], "c": [1.0]})
    with pytest.raises(ValueError, match="no items"):
        sign_flip_p({}, {})


@pytest.mark.parametrize("bad", [[], [float("nan")], [float("inf")]])
def test_a_score_that_is_none_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="b: a score"):
        sign_flip_p({"a": [1.0], "b": [1.0]}, {"a": [1.0], "b": bad})


def test_one_seed_gives_the_interval_over_items() -> None:
    scores_SQ = np.random.default_rng(4).normal(size=(1, 400))
    low, high = bootstrap_interval(scores_SQ)
    half = 1.96 * scores_SQ.std() / sqrt(400)
    assert [low, high] == pytest.approx([scores_SQ.mean() - half, scores_SQ.mean() + half], abs=half / 10)
    narrow = bootstrap_interval(scores_SQ, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(scores_SQ) == (low, high)


def test_seeds_are_drawn_too() -> None:
    # items do not vary: means are 0, 0.5 and 1 with chances 1/4, 1/2 and 1/4
    assert bootstrap_interval(np.array([[0.0] * 5, [1.0] * 5])) == (0, 1)
    assert bootstrap_interval(np.array([[0.0] * 5, [1.0] * 5]), level=0.4) == (0.5, 0.5)
    assert bootstrap_interval(np.array([[0.3] * 5])) == pytest.approx((0.3, 0.3))


def test_paired_interval_draws_the_same_items_for_both() -> None:
    second_SQ = np.random.default_rng(5).normal(size=(1, 50))
    assert paired_interval(second_SQ + 0.125, second_SQ) == pytest.approx((0.125, 0.125))


def test_paired_interval_draws_seeds_of_each_arm_alone() -> None:
    # equal arms of two seeds: one arm at 1 and the other at 0 has chance 1/16; drawn together they would never differ
    scores_SQ = np.array([[0.0] * 4, [1.0] * 4])
    assert paired_interval(scores_SQ, scores_SQ) == (-1, 1)
    assert paired_interval(scores_SQ, np.array([[0.5] * 4])) == (-0.5, 0.5)


def test_seeds_interval_by_hand() -> None:
    # means 2 and 0.5, variances 1 and 0.5: standard error sqrt(1/3 + 1/4), and Welch-Satterthwaite's degrees of freedom
    first, second = [1.0, 2.0, 3.0], [0.0, 1.0]
    error = sqrt(1 / 3 + 1 / 4)
    freedom = (1 / 3 + 1 / 4) ** 2 / ((1 / 3) ** 2 / 2 + (1 / 4) ** 2 / 1)
    half = stats.t.ppf(0.975, freedom) * error
    assert seeds_interval(first, second) == pytest.approx((1.5 - half, 1.5 + half))
    assert seeds_interval([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25)
    assert seeds_interval([0.5], [0.25, 0.5]) is None


def test_intervals_refuse_what_is_not_seeds_by_items() -> None:
    with pytest.raises(ValueError, match="3 items against 2"):
        paired_interval(np.ones((1, 3)), np.ones((1, 2)))
    for bad in (np.ones(3), np.ones((1, 0)), np.array([[np.nan]])):
        with pytest.raises(ValueError, match="seeds, items"):
            bootstrap_interval(bad)


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})  # b: 0.04 is raised to c's 2 x 0.03
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({1: 0.9, 2: 0.6}) == {1: 1.0, 2: 1.0}
    assert holm({("arm", "set"): 0.2}) == {("arm", "set"): 0.2}
    assert holm({}) == {}
