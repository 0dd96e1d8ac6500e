"""Which pairs are held out, and which are to train on."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchorembed.data.store import PairStore
from anchorembed.errors import InputError

Indices = NDArray[np.int64]
_HOLD_OUT = 7  # stream of random numbers


@dataclass(frozen=True, slots=True)
class Split:
    """Global indices of pairs to train on and of pairs held out.

    No text is a query or positive in both parts; hard negatives may be in both.
    """

    train: Indices
    held_out: Indices

    def held_out_sample(self, most: int) -> Indices:
        """At most ``most`` held-out pairs, every n-th: they are sorted by source, so the first are of few sources."""
        return self.held_out[:: math.ceil(len(self.held_out) / most) or 1]


def split(store: PairStore, held_out: int, seed: int) -> Split:
    """Hold out ``held_out`` pairs, at most a tenth of all; other pairs with a query or positive of theirs are left out.

    Raises:
        InputError: if fewer than two pairs are left to train on.
    """
    order = np.random.default_rng([seed, _HOLD_OUT]).permutation(len(store))
    chosen = np.sort(order[: min(held_out, len(store) // 10)])
    texts = np.concatenate([store.query_keys[chosen], store.positive_keys[chosen]])
    shared = np.isin(store.query_keys, texts) | np.isin(store.positive_keys, texts)
    train = np.flatnonzero(~shared)
    if len(train) < 2:
        sharing = int(shared.sum()) - len(chosen)
        raise InputError(
            f"data: {len(train)} pairs are left to train on, without {len(chosen)} held out and {sharing} that share a "
            "text with those; at least 2 are needed. Add pairs, or lower data.held_out."
        )
    return Split(train, chosen)
