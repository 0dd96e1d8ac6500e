"""Pairs come back from disk as they were, and are converted again only when their content changes."""

import logging
from pathlib import Path

import pytest

from anchorembed.data import store as stores
from anchorembed.data.pairs import read_pairs
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError
from text_files import beir
from tiny import write_pairs


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_round_trip_and_reuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = write_pairs(tmp_path / "one.jsonl", 20), write_pairs(tmp_path / "two.jsonl", 5, seed=1)
    sources = [SourceFile("one", one), SourceFile("two", two, "task")]
    store = open_store(sources, tmp_path / "cache")
    expected = [*read_pairs(one, source="one"), *read_pairs(two, source="two")]
    assert [store[i] for i in range(len(store))] == expected
    assert len(caplog.messages) == 2
    open_store(sources, tmp_path / "cache")
    assert len(caplog.messages) == 2, "a second opening converts nothing"
    for number, name in enumerate(("pairs.arrow", "notes.json"), 3):
        next((tmp_path / "cache").glob(f"*/{name}")).unlink()
        assert len(open_store(sources, tmp_path / "cache")) == 25
        assert len(caplog.messages) == number, "what was removed from the cache is converted again"
    write_pairs(one, 21)
    assert len(open_store(sources, tmp_path / "cache")) == 26


def test_bad_lines_stop_or_are_counted_and_leave_nothing_half_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    path.write_text(path.read_text(encoding="utf-8") + '{"query": "q", "positive": ""}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"pairs\.jsonl:4"):
        open_store([SourceFile("a", path)], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert len(open_store([SourceFile("a", path)], tmp_path / "cache", skip_bad=True)) == 3
    assert caplog.messages[-1] == 'a: 1 line dropped: "positive" is empty. First on line 4.'


def test_faults_that_differ_in_what_they_quote_are_one_reason(tmp_path: Path) -> None:
    folder = beir(tmp_path / "beir", "q1\td1\t1\nq1\tabc\t1\nq1\txyz\t1\nnone\td1\t1\n", split="train")
    (dropped,) = open_store([SourceFile("a", folder)], tmp_path / "cache", skip_bad=True).dropped
    assert dropped == {
        "document 'abc' is not in corpus.jsonl. First on line 3 of train.tsv.": 2,
        "query 'none' is not in queries.jsonl. First on line 5 of train.tsv.": 1,
    }


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_store([SourceFile("a", tmp_path / "none.jsonl")], tmp_path)


def test_dropped_lines_are_counted_by_reason_and_told_once_a_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 5)
    with path.open("a") as sink:
        sink.write('{"query": "", "positive": "p", "id": 1}\n{"query": 12, "positive": "p", "note": 2}\n')
        sink.write('{"query": " ", "positive": "p"}\n')
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        stores._dropped_lines.cache_clear()  # as in another process
        for _ in range(2):
            store = open_store([SourceFile("a", path)], tmp_path / "cache", skip_bad=True)
            assert sorted(store.dropped[0].values()) == [1, 2]
        assert sum("a: 2 lines dropped: " in message and "empty" in message for message in caplog.messages) == 1
        assert sum(message == "a: columns that are not used: 'id', 'note'" for message in caplog.messages) == 1
    assert [pair for chunk in store.chunks(0) for pair in chunk] == [store[index] for index in range(5)]
