"""Filters of written queries, by hand."""

from typing import Any

import numpy as np

from anchorembed.curate import keep_queries
from anchorembed.curate.keep_queries import (
    DUPLICATE,
    ECHO,
    NONE,
    SHORT,
    Query,
    copies,
    drop_useless,
    held_out_rows,
    is_retrieved,
)

TEXT = "The pump must not run dry, so fill the housing through the upper valve first."


def test_each_filter() -> None:
    written = [
        ["Sort a list!", "fill the housing through the upper valve", "sort", "sort  A LIST"],
        ["open a file", "where is it", "prime the pump"],
        [],
        ["where is it?"],
    ]
    kept, dropped = drop_useless(written, [TEXT] * 4)
    assert kept == [Query("Sort a list!", 0), Query("open a file", 1), Query("prime the pump", 1)]
    assert dropped == {NONE: 1, SHORT: 1, ECHO: 1, DUPLICATE: 3}


def test_a_copy_is_runs_of_words_and_not_words() -> None:
    assert copies("must not run dry so fill", TEXT), "punctuation is no difference"
    assert copies(TEXT, TEXT)
    assert not copies("upper valve housing", TEXT), "short queries of the text's words are what people type"
    assert not copies("why must the pump not run dry when I fill the valve", TEXT)
    assert copies("\u6570\u636e\u5e93\u7684\u7d22\u5f15", "\u8fd9\u662f\u6570\u636e\u5e93\u7684\u7d22\u5f15\u3002")


def test_what_is_not_found_in_the_first_is_lost(monkeypatch: Any) -> None:
    rows = {"a": [3, 2, 1], "b": [3, 3, 3], "c": [-np.inf, -np.inf, -np.inf]}

    def score(queries: list[str]) -> Any:
        assert len(queries) <= 2
        return np.array([rows[query] for query in queries], np.float32)

    monkeypatch.setattr(keep_queries, "_SCORES_AT_ONCE", 6)
    queries = [Query(text, row) for text, row in (("a", 0), ("a", 1), ("a", 2), ("b", 2), ("c", 0))]
    assert is_retrieved(queries, 3, score, 1) == [True, False, False, True, False]
    assert is_retrieved(queries, 3, score, 2) == [True, True, False, True, False]


def test_documents_are_held_out_by_their_text() -> None:
    texts = [f"text {number}" for number in range(50)]
    rows = held_out_rows(texts, 5)
    assert len(rows) == 5
    assert {texts[row] for row in rows} == {texts[::-1][row] for row in held_out_rows(texts[::-1], 5)}
    assert len(held_out_rows(texts, 100)) == 10, "a fifth at most"
