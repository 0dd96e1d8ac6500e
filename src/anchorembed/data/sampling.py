"""Which pairs form a step: all from one source, no text twice, a fresh order each epoch, the same for the same seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from anchorembed.data.store import PairStore
from anchorembed.errors import InputError

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs to train on and pairs set aside, as global indices.

    No query or positive of a held-out pair is a query or positive of a pair to train on; hard negatives may be.
    """

    train: Indices
    held_out: Indices


def split(store: PairStore, held_out: int, seed: int) -> Split:
    """Set aside ``held_out`` pairs, at most a tenth of all, and what shares a text with them.

    Raises:
        InputError: if fewer than two pairs are left to train on.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(store))
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


def batches(
    store: PairStore, train: Indices, size: int, seed: int, start: int = 0, temperature: float = 1.0
) -> Iterator[list[int]]:
    """Yield the pairs of step ``start``, ``start + 1``, ..., forever, as global indices.

    At temperature 1 an epoch goes through each source once, in full steps: its last pairs, which fill none, and those
    of a step that repetitions of its texts left short wait for another epoch's order. Above, a step's source is drawn
    with a probability proportional to its size to the power of 1 / temperature, and each source has epochs of its own.
    """
    if temperature != 1.0:
        yield from islice(_drawn(store, train, size, seed, temperature), start, None)
        return
    step = 0
    for epoch in count():
        planned = _epoch(store, train, size, seed, epoch)
        yield from planned[max(0, start - step) :]
        step += len(planned)


def share_used(store: PairStore, train: Indices, size: int, seed: int) -> float:
    """Share of the pairs that the first epoch uses."""
    return sum(map(len, _epoch(store, train, size, seed, 0))) / len(train)


def _epoch(store: PairStore, train: Indices, size: int, seed: int, epoch: int) -> list[list[int]]:
    sources = range(len(store.sources))
    planned = [batch for source in sources for batch in _source_epoch(store, train, size, [seed, epoch, source])]
    order = np.random.default_rng([seed, epoch]).permutation(len(planned))
    return [planned[i] for i in order]


def _drawn(store: PairStore, train: Indices, size: int, seed: int, temperature: float) -> Iterator[list[int]]:
    """Yield steps whose sources are drawn one by one."""

    def stream(source: int) -> Iterator[list[int]]:
        for epoch in count():
            yield from _source_epoch(store, train, size, [seed, epoch, source])

    sizes = np.array([len(_members(store, train, source)) for source in range(len(store.sources))], np.float64)
    weights = np.where(sizes > 0, sizes ** (1 / temperature), 0.0)
    streams = [stream(source) for source in range(len(sizes))]
    rng = np.random.default_rng([seed, 11])
    while True:
        yield next(streams[rng.choice(len(sizes), p=weights / weights.sum())])


def _members(store: PairStore, train: Indices, source: int) -> Indices:
    members: Indices = train[(train >= store.bounds[source]) & (train < store.bounds[source + 1])]
    return members


def _source_epoch(store: PairStore, train: Indices, size: int, key: list[int]) -> list[list[int]]:
    """One source's pairs in an order drawn from ``key``, whose last number is the source, cut into steps."""
    order = np.random.default_rng(key).permutation(_members(store, train, key[-1]))
    formed = _without_duplicates(store, order.tolist(), size)
    full = [batch for batch in formed if len(batch) == size]
    # A source that fills no step, being small or repetitive, is still used, in shorter steps.
    return full or formed


def _without_duplicates(store: PairStore, order: Sequence[int], size: int) -> list[list[int]]:
    """Cut an order into batches; a pair that shares a text with its batch waits for the next one.

    A batch is closed early when 8 times its size is waiting: then the source repeats itself too much to fill it.
    """
    formed: list[list[int]] = []
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
        formed.append(current)
    return formed
