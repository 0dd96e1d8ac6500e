"""Which pairs form a step, in an order that follows from seed and epoch.

They are of one source, and no two share a query or a positive; one's query may be another's positive.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np

from anchorembed.data.split import Indices
from anchorembed.data.store import PairStore

_DRAW = 11  # stream of random numbers, beside that of `split`


def batches(
    store: PairStore, train: Indices, size: int, seed: int, start: int = 0, temperature: float = 1.0
) -> Iterator[list[int]]:
    """Yield the pairs of steps ``start``, ``start + 1``, ..., without end, as global indices.

    At temperature 1 an epoch goes through each source once, in full steps. Pairs that fill no step, because a source
    ends or repeats its texts, are left out until the next epoch, which has another order. Above 1 a step's source is
    drawn with a probability proportional to its size to the power of 1 / temperature; each source has its epochs.
    """
    if temperature != 1.0:
        yield from islice(_drawn(store, train, size, seed, temperature), start, None)
        return
    step = 0
    for epoch in count():
        planned = _epoch(store, train, size, seed, epoch)
        yield from planned[max(0, start - step) :]
        step += len(planned)


def steps_an_epoch(store: PairStore, train: Indices, size: int, seed: int) -> int:
    """Number of steps of the first epoch: more than pairs / size where sources or pairs without repeats run out."""
    return len(_epoch(store, train, size, seed, 0))


def share_used(store: PairStore, train: Indices, size: int, seed: int) -> float:
    """Share of the pairs to train on that the first epoch uses, from 0 to 1."""
    return sum(map(len, _epoch(store, train, size, seed, 0))) / len(train)


def _epoch(store: PairStore, train: Indices, size: int, seed: int, epoch: int) -> list[list[int]]:
    sources = range(len(store.sources))
    planned = [batch for source in sources for batch in source_epoch(store, train, size, seed, epoch, source)]
    order = np.random.default_rng([seed, epoch]).permutation(len(planned))
    return [planned[i] for i in order]


def _drawn(store: PairStore, train: Indices, size: int, seed: int, temperature: float) -> Iterator[list[int]]:
    """Yield steps as `batches` does above temperature 1."""

    def stream(source: int) -> Iterator[list[int]]:
        for epoch in count():
            yield from source_epoch(store, train, size, seed, epoch, source)

    sizes = np.array([len(_members(store, train, source)) for source in range(len(store.sources))], np.float64)
    weights = np.where(sizes > 0, sizes ** (1 / temperature), 0.0)
    streams = [stream(source) for source in range(len(sizes))]
    rng = np.random.default_rng([seed, _DRAW])
    while True:
        yield next(streams[rng.choice(len(sizes), p=weights / weights.sum())])


def _members(store: PairStore, train: Indices, source: int) -> Indices:
    members: Indices = train[(train >= store.bounds[source]) & (train < store.bounds[source + 1])]
    return members


def source_epoch(
    store: PairStore, train: Indices, size: int, seed: int, epoch: int, source: int
) -> Iterator[list[int]]:
    """Steps of one source's pairs in an epoch, as global indices, computed one by one.

    All steps are full; if no step can be filled, the shorter ones are yielded.
    """
    order = np.random.default_rng([seed, epoch, source]).permutation(_members(store, train, source))
    any_full, shorter = False, list[list[int]]()
    for step in _without_duplicates(store, order.tolist(), size):
        if len(step) == size:
            any_full = True
            yield step
        else:
            shorter.append(step)
    if not any_full:
        yield from shorter


def _without_duplicates(store: PairStore, order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut an order into steps; a pair that shares a query or a positive with its step waits for the next one.

    A step ends early when 8 times its size is waiting: then the source repeats its texts too much to fill it.
    """
    pending = list(reversed(order))
    while pending:
        current: list[int] = []
        waiting: list[int] = []
        seen: set[tuple[str, int]] = set()
        while pending and len(current) < size and len(waiting) < 8 * size:
            index = pending.pop()
            texts = {("query", int(store.query_keys[index])), ("positive", int(store.positive_keys[index]))}
            if texts & seen:
                waiting.append(index)
            else:
                current.append(index)
                seen |= texts
        pending += reversed(waiting)
        yield current
