"""Whether a difference between two arms is more than chance.

An arm is trained with several seeds, and each trained model scores the same items (queries). Both are samples: tests
and intervals resample them with a fixed seed, so the same scores always give the same numbers.

Axes: S seeds, Q items, B resamplings done at once.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from anchorembed.errors import extra

K = TypeVar("K", bound=Hashable)
Floats = NDArray[np.floating[Any]]
Scores = Mapping[str, Sequence[float]]  # by item id, one score per seed

_DRAWS = 10_000  # resamplings of an interval
_NUMBERS_PER_BLOCK = 1 << 20
_TIE = 1e-10  # flipped means within this share of the mean absolute difference equal the observed one


def sign_flip_p(scores: Scores, others: Scores, flips: int = 10_000) -> float:
    """Two-sided p of the mean difference between two arms, by random sign flips over items (a permutation test).

    Each item's scores are averaged over the seeds of its arm first; the arms may have different numbers of seeds.
    Raises ValueError if the items differ, or if a score is missing or not finite.
    """
    difference_Q = _differences(scores, others)
    least = abs(float(difference_Q.sum())) - _TIE * float(np.abs(difference_Q).sum())
    rng = np.random.default_rng(0)
    extreme = 0
    for size in _blocks(flips, len(difference_Q)):
        kept_BQ = rng.integers(0, 2, (size, len(difference_Q)), dtype=np.int8)
        flipped_B = 2 * (kept_BQ @ difference_Q) - difference_Q.sum()
        extreme += int((np.abs(flipped_B) >= least).sum())
    return (1 + extreme) / (1 + flips)


def bootstrap_interval(scores_SQ: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of an arm's mean score: seeds and items are drawn with replacement.

    A draw takes the same items for each of its seeds. With one seed only items are drawn. With few seeds the interval
    is too narrow, as any bootstrap of few values is.
    """
    return _percentiles(_resampled_means([_checked(scores_SQ)])[0], level)


def paired_interval(scores_SQ: Floats, others_SQ: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the difference of two arms' means, whose items are the same and in the same order.

    A draw takes the same items for both arms, but draws seeds for each arm independently, even if the arms' seeds are
    the same numbers: training two arms with one seed does not make a pair. With few seeds the interval is too narrow:
    see ``seeds_interval``. Raises ValueError if the item counts differ.
    """
    scores_SQ, others_SQ = _checked(scores_SQ), _checked(others_SQ)
    if scores_SQ.shape[1] != others_SQ.shape[1]:
        raise ValueError(f"{scores_SQ.shape[1]} items against {others_SQ.shape[1]}: the arms need the same items")
    means = _resampled_means([scores_SQ, others_SQ])
    return _percentiles(means[0] - means[1], level)


def seeds_interval(means_S: Sequence[float], others_S: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval, by Welch's t, of the difference of two arms' means over seeds; None with fewer than two seeds.

    It covers training with other seeds, on the same items. Unlike a bootstrap it is not too narrow with few seeds.
    """
    if min(len(means_S), len(others_S)) < 2:
        return None
    if len(set(means_S)) == len(set(others_S)) == 1:  # nothing varies: no t
        return (means_S[0] - others_S[0],) * 2
    with extra("compare"):
        from scipy.stats import ttest_ind  # noqa: PLC0415 - an extra
    interval = ttest_ind(means_S, others_S, equal_var=False).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Adjust the p of a family of m tests by Holm-Bonferroni: the k-th smallest times m - k + 1, never decreasing."""
    adjusted: dict[K, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def _differences(scores: Scores, others: Scores) -> Floats:
    """Difference of two arms' means over seeds, per item in order of id."""
    unmatched = sorted(scores.keys() ^ others.keys())
    if unmatched:
        raise ValueError(f"{len(unmatched)} items are in one arm only, such as {', '.join(unmatched[:3])}")
    if not scores:
        raise ValueError("there are no items to compare")
    for item in scores:
        if not (len(scores[item]) and len(others[item]) and np.isfinite([*scores[item], *others[item]]).all()):
            raise ValueError(f"{item}: a score is missing or not finite")
    return np.array([np.mean(scores[item]) - np.mean(others[item]) for item in sorted(scores)])


def _blocks(count: int, width: int) -> Iterator[int]:
    """Sizes of blocks that make up ``count`` rows of ``width`` numbers."""
    rows = max(1, _NUMBERS_PER_BLOCK // width)
    for start in range(0, count, rows):
        yield min(rows, count - start)


def _checked(scores_SQ: Floats) -> Floats:
    if scores_SQ.ndim != 2 or not scores_SQ.size or not np.isfinite(scores_SQ).all():
        raise ValueError(f"scores of shape {scores_SQ.shape} are not [seeds, items], or not all finite")
    return scores_SQ


def _resampled_means(arms: Sequence[Floats]) -> Floats:
    """Mean of each arm [arms, `_DRAWS`]; a draw takes the same items for all arms and each arm's own seeds."""
    rng = np.random.default_rng(0)
    items = arms[0].shape[1]
    blocks = []
    for size in _blocks(_DRAWS, items):
        drawn_BQ = rng.integers(0, items, (size, items), dtype=np.int32)
        block = []
        for scores_SQ in arms:
            means_SB = np.stack([scores_Q[drawn_BQ].mean(axis=1) for scores_Q in scores_SQ])
            drawn_SB = rng.integers(0, len(scores_SQ), means_SB.shape)
            block.append(np.take_along_axis(means_SB, drawn_SB, axis=0).mean(axis=0))
        blocks.append(np.stack(block))
    return np.concatenate(blocks, axis=1)


def _percentiles(means: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
