"""Held-out pairs share no text with those to train on."""

import json
from pathlib import Path

import pytest

from anchorembed.data.split import split
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError
from tiny import write_pairs


def test_held_out_texts_are_never_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"q{i // 2}", "positive": f"p{i // 3}"} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    store = open_store([SourceFile("a", path)], tmp_path / "cache")
    parts = split(store, 8, 0)
    held = [store[int(i)] for i in parts.held_out]
    trained = [store[int(i)] for i in parts.train]
    assert len(held) == 8
    texts = {text for pair in held for text in (pair.query, pair.positive)}
    assert not texts & {text for pair in trained for text in (pair.query, pair.positive)}


def test_a_sample_of_held_out_pairs_is_of_all_sources(tmp_path: Path) -> None:
    sources = [SourceFile(name, write_pairs(tmp_path / f"{name}.jsonl", 60, seed)) for seed, name in enumerate("abc")]
    store = open_store(sources, tmp_path / "cache")
    parts = split(store, 18, 0)
    sample = parts.held_out_sample(9)
    assert len(sample) == 9
    assert {store.source_of(int(index)) for index in sample} == {0, 1, 2}
    assert parts.held_out_sample(18).tolist() == parts.held_out.tolist()
    assert split(store, 0, 0).held_out_sample(9).tolist() == []


def test_too_few_pairs(tmp_path: Path) -> None:
    store = open_store([SourceFile("a", write_pairs(tmp_path / "a.jsonl", 1))], tmp_path / "cache")
    with pytest.raises(InputError, match="1 pairs are left"):
        split(store, 0, 0)
