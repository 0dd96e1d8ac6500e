"""Held-out pairs as a test: nDCG by hand and as ir-measures has it, texts once, tasks before the texts."""

from dataclasses import replace
from math import log2
from typing import Any

import numpy as np
import pytest

from anchorembed.data.pairs import TextPair
from anchorembed.evaluate import held_out
from anchorembed.evaluate.held_out import ndcg_at_10, pair_search, search_by_embedder, search_by_words
from anchorembed.evaluate.metrics import measure_queries
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Prompts, instruct


def scores(*values: float) -> Any:
    return np.array(values, np.float32)


def test_ndcg_by_hand() -> None:
    assert ndcg_at_10(scores(3, 2, 1), {0}) == 1
    assert ndcg_at_10(scores(3, 2, 1), {2}) == pytest.approx(1 / log2(4))
    both = (1 + 1 / log2(4)) / (1 + 1 / log2(3))
    assert ndcg_at_10(scores(3, 2, 1), {0, 2}) == pytest.approx(both)
    assert ndcg_at_10(scores(*range(20)), {9}) == 0, "rank 11"
    assert ndcg_at_10(scores(*range(20)), set(range(20))) == pytest.approx(1), "more than fit"


def test_a_tie_is_no_merit_and_what_is_not_found_has_no_rank() -> None:
    assert ndcg_at_10(scores(1, 1, 1), {0}) == pytest.approx(1 / log2(4))
    assert ndcg_at_10(scores(-np.inf, 1), {0}) == 0
    assert ndcg_at_10(scores(np.nan, 1), {0}) <= 1 / log2(3)


def test_ndcg_is_that_of_ir_measures() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores_D = rng.normal(size=30).astype(np.float32)
        relevant = set(rng.choice(30, rng.integers(1, 15), replace=False).tolist())
        ranking = {"q": {str(row): float(score) for row, score in enumerate(scores_D)}}
        judged = measure_queries(ranking, {"q": {str(row): 1 for row in relevant}}, ["ndcg_at_10"])
        assert ndcg_at_10(scores_D, relevant) == pytest.approx(judged["ndcg_at_10"]["q"])


def test_each_text_is_in_the_test_once() -> None:
    pairs = [TextPair("a", "x"), TextPair("b", "x"), TextPair("a", "y"), TextPair("a", "x")]
    test = pair_search([(pair, (None, False)) for pair in pairs])
    assert test.queries == [((None, False), "a"), ((None, False), "b")]
    assert test.documents == [((None, False), "x"), ((None, False), "y")]
    assert test.relevant == [{0, 1}, {0}]
    other = pair_search([(pair, ("Find it", False)) for pair in pairs])
    assert test.digest != other.digest


def test_the_embedder_s_vectors_are_compared_with_the_prompts_of_training(embedder: Embedder) -> None:
    embedder.metadata = replace(embedder.metadata, prompts=Prompts("Q: ", "D: "))
    rows = [("sort a list", None, False), ("open file", "find", False), ("read row", "find", True)]
    rows += [("delete", "", False), ("write", None, True)]
    asked = [(TextPair(text, f"{text} {text}"), (task, symmetric)) for text, task, symmetric in rows]
    found = search_by_embedder(pair_search(asked), embedder)
    before = [
        ("Q: ", "D: "),
        (instruct("find"), "D: "),
        (instruct("find"), instruct("find")),
        ("", "D: "),
        ("Q: ", "Q: "),
    ]
    queries = embedder.encode([of + text for (of, _), (text, *_) in zip(before, rows, strict=True)], "query", "")
    texts = [f"{of}{text} {text}" for (_, of), (text, *_) in zip(before, rows, strict=True)]
    documents = embedder.encode(texts, "document", "")
    assert found == pytest.approx([ndcg_at_10(documents @ query, {row}) for row, query in enumerate(queries)])


def test_all_queries_are_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(TextPair(f"q{number}", f"d{number}"), (None, False)) for number in range(5)]
    monkeypatch.setattr(held_out, "_SCORES_AT_ONCE", 10)
    blocks: list[list[str]] = []

    def score(queries: list[str]) -> Any:
        blocks.append(queries)
        return np.stack([np.eye(5, dtype=np.float32)[int(query[1:])] for query in queries])

    assert search_by_words(pair_search(asked), score) == [1.0] * 5
    assert [len(block) for block in blocks] == [2, 2, 1]
