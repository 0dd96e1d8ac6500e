"""Hard negatives: every filter on hand-made scores, BM25 by its formula, the output trains as it is."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anchorembed.api import mine as mine_file
from anchorembed.curate.mine import (
    GIVEN,
    MARGIN,
    NEAR,
    POSITIVE,
    QUERY,
    RERANKED_AT_ONCE,
    Mined,
    Rules,
    by_bm25,
    by_embedder,
    gather,
    mine,
    words,
)
from anchorembed.curate.rerank import Logits, by_cross_encoder
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats
from anchorembed.recipe_file import parse_recipe
from anchorembed.train.run import train
from tiny import recipe_values, save_cross_encoder, write_pairs

TEXTS = [
    "the answer in six words here",  # 0: the positive
    "The answer, in six words here",  # 1: five of its six words and one other: 5/7
    "six words here in THE  answer",  # 2: the same words
    "What is asked",  # 3: the query itself
    "another answer of the same query",  # 4: the query's other positive
    "something else entirely",  # 5
    "quite far away",  # 6
]
PAIR = TextPair("what is asked", TEXTS[0], ("given",))
OTHER = TextPair("What is  asked", TEXTS[4])
SCORES = {0: 1.0, 1: 0.96, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.6, 6: 0.5}


def scored(queries: list[str]) -> Floats:
    return np.array([[SCORES[row] for row in range(len(TEXTS))]] * len(queries), np.float32)


def mined(**rules: object) -> tuple[list[TextPair], Mined]:
    found, pairs = Mined(), [PAIR, OTHER]
    return list(mine(pairs, gather(pairs, TEXTS), scored, Rules(**rules), found)), found  # type: ignore[arg-type]


def test_each_filter_drops_what_it_names() -> None:
    pairs, found = mined(count=2)
    assert pairs[0].negatives == (TEXTS[5], TEXTS[6], "given")
    # the other pair's positive scores 0.7, and so the margin is 0.665
    assert pairs[1].negatives == (TEXTS[5], TEXTS[6])
    assert found.dropped == {POSITIVE: 4, QUERY: 2, GIVEN: 0, NEAR: 1, MARGIN: 3}
    assert found.by_negatives == {2: 2}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"margin": 0.97}, TEXTS[1]),  # what was above the margin no longer is
        ({"margin": 0.97, "near": 0.7}, TEXTS[5]),  # 5/7 is more than 0.7
        ({"near": 1.0, "margin": 0.95}, TEXTS[2]),
        ({"first_rank": 5}, TEXTS[6]),  # rank 5 without the query's own positives
    ],
)
def test_a_filter_loosened_or_tightened_changes_what_is_found(rules: dict[str, object], expected: str) -> None:
    assert mined(**rules)[0][0].negatives[0] == expected


def test_ranks_end_where_they_are_told_to() -> None:
    pairs, found = mined(last_rank=3, count=5)
    assert pairs[0].negatives == ("given",)
    assert found.by_negatives == {0: 2}


def test_a_margin_of_a_positive_below_zero_asks_for_less_than_it() -> None:
    def negative(queries: list[str]) -> Floats:
        return scored(queries) - 1.55

    (pair,) = mine([PAIR], gather([PAIR], TEXTS), negative, Rules(near=1.0), Mined())
    assert pair.negatives[0] == TEXTS[1]


def test_a_query_s_positives_are_no_negatives_in_other_case_or_white_space() -> None:
    pairs, found = [PAIR, OTHER], Mined()
    pool = gather(pairs, [f" {TEXTS[0]}", TEXTS[4].upper(), TEXTS[5], "another  answer of the same query"])
    rules = Rules(last_rank=1, margin=2.0, near=1.0)
    with_negatives = mine(pairs, pool, lambda queries: np.ones((len(queries), 6), np.float32), rules, found)
    assert [pair.negatives for pair in with_negatives] == [(TEXTS[5], "given"), (TEXTS[5],)]
    assert found.dropped == {POSITIVE: 4, QUERY: 0, GIVEN: 0, NEAR: 0, MARGIN: 0}


def test_a_pair_s_negatives_and_empty_texts_are_not_mined() -> None:
    pair, found = TextPair("q", "p", ("a B", "c"), scores=(3.0, 2.0, 1.0)), Mined()
    pool = gather([pair], ["A  b", "", "d e", "D e", " \n", "c"])
    rules = Rules(count=2, margin=2.0)
    (with_negatives,) = mine([pair], pool, lambda _: np.ones((1, len(pool.texts)), np.float32), rules, found)
    assert with_negatives == TextPair("q", "p", ("d e", "a B", "c"))
    assert (found.dropped[GIVEN], found.by_negatives) == (3, {1: 1})


def test_pairs_that_lose_their_scores_are_counted(tmp_path: Path, said: list[str]) -> None:
    """Scores are kept where nothing is mined, as the first pair's only candidate is a negative that it has."""
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    texts = [("read a file", "open the file", "a row is read"), ("write a row of a file", "a row is read", "no")]
    rows = [{"query": q, "positive": p, "negative": n, "scores": [3, 1]} for q, p, n in texts]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = mine_file(source, out, rules=Rules(margin=5.0))
    assert [(pair.negatives, pair.scores) for pair in read_pairs(out)] == [
        (("a row is read",), (3.0, 1.0)),
        (("open the file", "no"), ()),
    ]
    assert found.lost_scores == 1
    assert any(line.startswith("1 pairs got negatives that their scores do not cover") for line in said)


@pytest.mark.parametrize("rules", [{"first_rank": 0}, {"first_rank": 5, "last_rank": 4}, {"count": 0}, {"margin": 0.0}])
def test_rules_that_ask_for_nothing_are_refused(rules: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Rules(**rules)  # type: ignore[arg-type]


def test_bm25_is_its_formula() -> None:
    texts = ["cat cat dog", "dog bird", "fish"]
    scores = by_bm25(texts)(["cat dog", "?"])
    lengths, mean = [3, 2, 1], 2.0

    def weight(count: int, length: int, documents: int) -> float:
        idf = math.log(1 + (3 - documents + 0.5) / (documents + 0.5))
        return idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * length / mean))

    expected = [weight(2, lengths[0], 1) + weight(1, lengths[0], 2), weight(1, lengths[1], 2), -math.inf]
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert scores[1].tolist() == [-math.inf] * 3


def test_bm25_calls_nothing_near_that_shares_no_word() -> None:
    pairs = [TextPair("cat", "cat dog"), TextPair("two", "other words")]
    pool, found = gather(pairs, ["bird", "cat", "two birds"]), Mined()
    assert [pair.negatives for pair in mine(pairs, pool, by_bm25(pool.texts), Rules(count=5), found)] == [(), ()]
    assert found.dropped == {POSITIVE: 1, QUERY: 1, GIVEN: 0, NEAR: 0, MARGIN: 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, a_b 42 x", ["the", "cat", "a_b", "42"]),
        ("\N{GRINNING FACE} a \N{SNOWMAN}", []),
        ("Python3是一种语言。好", ["python3", "是一", "一种", "种语", "语言", "好"]),
        ("かな", ["かな"]),
        ("ที่นี่", ["ที", "ี่", "่น", "นี", "ี่"]),
    ],
)
def test_words_of_scripts_with_and_without_spaces(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_chinese_finds_negatives() -> None:
    rows = ["如何读取文件", "如何写入文件", "怎样排序列表", "怎样删除列表"]
    pairs = [TextPair(row, f"{row[2:]}的方法如下") for row in rows]
    pool = gather(pairs)
    found = mine(pairs, pool, by_bm25(pool.texts), Rules(near=1.0), Mined())
    assert [pool.rows[pair.negatives[0]] for pair in found] == [1, 0, 3, 2]


def test_texts_without_words_find_nothing_and_that_is_said(tmp_path: Path, said: list[str]) -> None:
    rows = [("\N{GRINNING FACE}", "\N{SNOWMAN}"), ("a", "b"), ("c", "d e")]
    source, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    for count, more in ((3, []), (3, [("read a file", "open the file"), ("write a file", "the file opens")])):
        pairs = [{"query": query, "positive": positive} for query, positive in rows + more]
        source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        said.clear()
        assert mine_file(source, out, rules=Rules(margin=5.0, near=1.0)).by_negatives[0] == count
        assert any(f"{count} of {len(pairs)} queries have no word that BM25 can search by" in line for line in said)
    assert [bool(pair.negatives) for pair in read_pairs(out)] == [False, False, False, True, True]


def test_an_embedder_scores_by_cosine(embedder: Embedder) -> None:
    texts = ["read a file", "sort rows"]
    expected = embedder.encode(["open a table"], "query") @ embedder.encode(texts).T
    assert np.allclose(by_embedder(embedder.encode, texts)(["open a table"]), expected, atol=1e-6)


def test_texts_are_gathered_once() -> None:
    pool = gather([PAIR, OTHER, PAIR], ["a", TEXTS[0], "a"])
    assert pool.texts == ["a", TEXTS[0], TEXTS[4]]
    assert pool.positives("what is ASKED") == {1, 2}
    assert pool.positives("another") == set()


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    (tmp_path / "link.jsonl").symlink_to(pairs)
    before = pairs.read_bytes()
    with pytest.raises(InputError, match=r"this file is also read\. Name another file"):
        mine_file(pairs, tmp_path / "link.jsonl")
    assert pairs.read_bytes() == before


@pytest.mark.parametrize("out", ["mined.jsonl", "new/mined.jsonl"])
def test_nothing_is_written_into_the_folder_of_pairs(tmp_path: Path, out: str) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 8)
    with pytest.raises(InputError, match=rf"{out}: it is in {tmp_path}, all of which is read\. Name a place"):
        mine_file(tmp_path, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("by", ["bm25", "tiny"])
def test_what_is_written_trains_as_it_is(tmp_path: Path, tiny_folder: Path, by: str) -> None:
    source, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "mined.jsonl.gz"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": str(n), "text": f"file number {n}"}) + "\n" for n in range(40)))
    rules = Rules(count=2, margin=1.0, near=0.9)
    found = mine_file(source, out, by=tiny_folder if by == "tiny" else by, corpus=corpus, rules=rules)
    before, after = list(read_pairs(source)), list(read_pairs(out))
    assert [(pair.query, pair.positive) for pair in after] == [(pair.query, pair.positive) for pair in before]
    assert sum(found.by_negatives.values()) == len(before)
    assert all(pair.positive not in pair.negatives for pair in after)
    assert sum(len(pair.negatives) for pair in after) > len(before)


# Candidates scored anew

LOGITS = {0: 2.0, 1: 0.0, 2: -4.0, 3: 9.0, 4: -6.0, 5: 1.8, 6: -4.5}  # of a cross-encoder


def reranked(asked: list[tuple[str, str]]) -> Logits:
    return np.array([LOGITS[TEXTS.index(text)] if text in TEXTS else -9.0 for _, text in asked])


def test_a_reranker_orders_and_filters_by_its_own_scores_and_they_are_kept() -> None:
    found, pairs = Mined(), [PAIR, OTHER]
    first, second = mine(pairs, gather(pairs, TEXTS), scored, Rules(count=2, near=1.0), found, reranked)
    # 0.95 * sigmoid(2) is 0.837: sigmoid(1.8), 0.858, is above it, sigmoid(0) is not
    assert first.negatives == (TEXTS[1], TEXTS[2], "given")
    assert first.scores == (2.0, 0.0, -4.0, -9.0)
    # 0.95 * sigmoid(-6) is 0.00235: all others are above it
    assert (second.negatives, second.scores) == ((), (-6.0,))
    assert found.by_negatives == {2: 1, 0: 1}
    assert found.dropped == {POSITIVE: 4, QUERY: 2, GIVEN: 0, NEAR: 0, MARGIN: 5}


def test_candidates_are_scored_window_by_window_and_written_as_they_come() -> None:
    pairs = [TextPair(f"query {n}", f"text {n}") for n in range(300)]
    pool, sizes, taken = gather(pairs), list[int](), list[int]()

    def counted(asked: list[tuple[str, str]]) -> Logits:
        sizes.append(len(asked))
        return np.zeros(len(asked))

    def stream() -> Iterator[TextPair]:
        for number, pair in enumerate(pairs):
            taken.append(number)
            yield pair

    found = mine(stream(), pool, lambda queries: np.ones((len(queries), 300), np.float32), Rules(), Mined(), counted)
    next(found)
    assert len(taken) < 50
    assert len(list(found)) == 299
    assert sum(sizes) == 300 * 101
    assert max(sizes) <= RERANKED_AT_ONCE


@pytest.mark.slow
def test_what_a_cross_encoder_scored_trains_with_its_scores(tmp_path: Path, tiny_folder: Path) -> None:
    source, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "mined.jsonl"
    folder = save_cross_encoder(tmp_path / "reranker")
    mine_file(source, out, rules=Rules(count=2, margin=5.0, near=0.9), rerank=folder)
    pairs = list(read_pairs(out))
    score = by_cross_encoder(folder)
    for pair in pairs[:5]:
        texts = (pair.positive, *pair.negatives)
        assert pair.scores == pytest.approx(score([(pair.query, text) for text in texts]), abs=1e-4)
        assert list(pair.scores[1:]) == sorted(pair.scores[1:], reverse=True)
    assert sum(len(pair.scores) == 3 for pair in pairs) > 50
    values = recipe_values(out, tiny_folder, tmp_path / "run")
    settings = {"steps": 1, "batch_size": 8, "warmup_steps": 0, "distill": 1.0, "hard_negatives": 2}
    train(parse_recipe(values | {"reconstruct": None, "contrast": settings}))
    assert (tmp_path / "run" / "contrast" / "model").is_dir()
