"""A step's pairs come from one source, no two share a query or a positive, and they are the same for the same seed."""

import json
from itertools import islice
from pathlib import Path

import pytest

from anchorembed.data.sampling import _epoch, batches, share_used
from anchorembed.data.split import split
from anchorembed.data.store import PairStore, SourceFile, open_store
from tiny import write_pairs


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    one, two = write_pairs(tmp_path / "one.jsonl", 60), tmp_path / "two.jsonl"
    rows = [{"query": f"q{i // 2}", "positive": f"p{i // 3}"} for i in range(60)]
    two.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_store([SourceFile("one", one), SourceFile("two", two)], tmp_path / "cache")


def first(store: PairStore, count: int, seed: int = 0, start: int = 0) -> list[list[int]]:
    return list(islice(batches(store, split(store, 8, seed).train, 8, seed, start), count))


def test_one_source_and_no_text_twice(store: PairStore) -> None:
    for batch in first(store, 40):
        pairs = [store[i] for i in batch]
        assert len({pair.source for pair in pairs}) == 1
        assert len({pair.query for pair in pairs}) == len({pair.positive for pair in pairs}) == len(batch) == 8


def test_deterministic_fresh_each_epoch_and_resumable(store: PairStore) -> None:
    steps = first(store, 40)
    assert steps == first(store, 40)
    assert steps != first(store, 40, seed=1)
    assert first(store, 20, start=20) == steps[20:]
    seen: list[frozenset[int]] = [frozenset(batch) for batch in steps]
    assert len(set(seen)) > 35


def test_a_source_smaller_than_a_step_is_used(tmp_path: Path) -> None:
    store = open_store([SourceFile("a", write_pairs(tmp_path / "a.jsonl", 5))], tmp_path / "cache")
    steps = list(islice(batches(store, split(store, 0, 0).train, 8, 0), 3))
    assert [len(batch) for batch in steps] == [5, 5, 5]


def test_temperature_makes_sources_more_alike(tmp_path: Path) -> None:
    """Sizes 240 and 30: shares of 8/9 and 1/9 at 1; at 2 their square roots', 2.83 to 1; resumed = uninterrupted."""
    sources = []
    for name, count in (("large", 240), ("small", 30)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"query": f"{name} q{i}", "positive": f"{name} p{i}"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources.append(SourceFile(name, path))
    store = open_store(sources, tmp_path / "cache")
    train = split(store, 0, 0).train
    for temperature, expected in ((1.0, 8 / 9), (2.0, 8**0.5 / (8**0.5 + 1)), (1e6, 0.5)):
        steps = list(islice(batches(store, train, 6, 0, 0, temperature), 900))
        share = sum(store[batch[0]].source == "large" for batch in steps) / len(steps)
        assert share == pytest.approx(expected, abs=0.04), temperature
        assert list(islice(batches(store, train, 6, 0, 30, temperature), 20)) == steps[30:50]
    used = [index for batch in steps[:200] if batch[0] < 240 for index in batch]
    assert set(used) == set(range(240)) & set(train.tolist())


def test_the_share_used_is_what_the_first_epoch_has(store: PairStore) -> None:
    train = split(store, 8, 0).train
    epoch = len({index for batch in first(store, 14) for index in batch})
    assert share_used(store, train, 8, 0) == sum(map(len, _epoch(store, train, 8, 0, 0))) / len(train)
    assert epoch / len(train) >= share_used(store, train, 8, 0) > 0.5
