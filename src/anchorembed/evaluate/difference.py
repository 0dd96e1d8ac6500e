"""Whether one model is better than another on the same queries, with interval and p."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anchorembed.evaluate.statistics import paired_interval, sign_flip_p

LEVEL = 0.95
FEWEST = 1 + math.floor(math.log2(2 / (1 - LEVEL)))  # items with a p below 1 - LEVEL: the least p of n is 2 / 2**n
Word = Literal["better", "worse", "cannot be told"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference of two models' scores, its interval, and the p of a paired test against no difference."""

    value: float
    low: float
    high: float
    p: float

    @property
    def word(self) -> Word:
        """Better or worse if both the test and the interval say so.

        The interval alone is too narrow for a handful of queries; the test cannot reach 0.05 with fewer than `FEWEST`.
        """
        if self.p < 1 - LEVEL and (self.low > 0 or self.high < 0):
            return "better" if self.value > 0 else "worse"
        return "cannot be told"

    def __str__(self) -> str:
        return f"{self.value:+.3f}, {LEVEL:.0%} interval {self.low:+.3f} to {self.high:+.3f}, p = {self.p:.2g}"


def difference(scores: Mapping[str, float], others: Mapping[str, float]) -> Difference:
    """Compare two models' scores of the same items, such as queries; raises ValueError if the items differ."""
    ours, theirs = ({item: [score] for item, score in by_item.items()} for by_item in (scores, others))
    p = sign_flip_p(ours, theirs)
    scores_1Q, others_1Q = (np.array([[by_item[item] for item in sorted(scores)]]) for by_item in (scores, others))
    low, high = paired_interval(scores_1Q, others_1Q, level=LEVEL)
    return Difference(float(scores_1Q.mean() - others_1Q.mean()), low, high, p)
