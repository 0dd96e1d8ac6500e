"""The first tokens of a cut text are those of the whole text, for each kind of tokenizer."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from anchorembed.model import first_tokens
from anchorembed.model.first_tokens import all_ids, find_cuts, first_ids
from tiny import DATA

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = [
    "Read a file line by line. Return the lines, as a list of strings!",
    "don't sort 1234 values\n\n  of a list: keep it's order; 'tis so.\tIsn't it?",
    "向量检索将文本映射到同一空间。每个词都有一个位置\uff0c位置相近则意思相近。",
    "café naïve e\u0301 🙂🙂 👨‍👩‍👧 ... --- ??? a.b.c, x;y:z",
]


def split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def pieces_of_words() -> Tokenizer:
    """As Llama 2 has them: spaces become letters of the vocabulary, and merges may cross all else."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    words = [f"▁{word}" for sentence in SENTENCES[:3] for word in sentence.split()]
    tokenizer.train_from_iterator([*words, "▁▁▁"], trainer)
    return tokenizer


def with_added(*contents: str) -> Tokenizer:
    tokenizer = byte_level(split_by(LLAMA3))
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in contents])
    return tokenizer


TOKENIZERS = {
    "tests": lambda: Tokenizer.from_file(str(DATA / "tokenizer.json")),
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(split_by(LLAMA3)),
    "qwen2": lambda: byte_level(split_by(QWEN2), normalizers.NFC()),
    "gpt4o": lambda: byte_level(split_by(GPT4O), normalizers.NFKC()),
    "digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "added": lambda: with_added("e. ", "  ", "list\n", "🙂"),
    "llama2": pieces_of_words,
}
PARTS = st.sampled_from(
    [
        *" .,;:!?\n\t'",
        "  ",
        "a",
        "list",
        "Sort",
        "12",
        "345",
        "'s",
        "文",
        "本。",
        "\uff0c",
        "e\u0301",
        "が",
        "\u3099",
        "🙂",
        "\u200d",
    ]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(PARTS, max_size=120).map("".join))


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = TOKENIZERS[request.param]()
    return tokenizer


@pytest.mark.parametrize("most", [1, 3, 17])
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_first_tokens_are_those_of_the_whole_text(backend: Tokenizer, most: int, texts: list[str]) -> None:
    cuts = find_cuts(backend)
    assert cuts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_tokens, "_CHARACTERS_A_TOKEN", 1)
        patch.setattr(first_tokens, "_AT_ONCE", 40)
        expected = [backend.encode(text, add_special_tokens=False).ids[:most] for text in texts]
        assert first_ids(backend, cuts, texts, most) == expected


def test_each_cut_keeps_both_sides_apart(backend: Tokenizer) -> None:
    """Tokens before a cut are the same whatever follows: the test of which the one above sees the consequence."""
    cuts, rng = find_cuts(backend), random.Random(1)
    assert cuts is not None
    parts = [part for sentence in SENTENCES for part in (sentence, *sentence)]
    checked = 0
    for _ in range(300):
        text = "".join(rng.choices(parts, k=12))
        whole = backend.encode(text, add_special_tokens=False).ids
        for match in cuts.finditer(text):
            before = backend.encode(text[: match.start() + 1], add_special_tokens=False).ids
            assert whole[: len(before)] == before
            checked += 1
    assert checked > 300


def changed(**parts: Any) -> Tokenizer:
    rules = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))
    return Tokenizer.from_str(json.dumps(rules | parts))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "NFD"}},
        {"normalizer": {"type": "StripAccents"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}},
        {"pre_tokenizer": {"type": "BertPreTokenizer"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\S+ \S+"}, "behavior": "Isolated", "invert": False}},
    ],
)
def test_a_part_that_is_not_known_cuts_nothing(parts: dict[str, Any]) -> None:
    tokenizer, text = changed(**parts), "sort the list, then read it. " * 40
    assert find_cuts(tokenizer) is None
    assert first_ids(tokenizer, None, [text], 5) == [tokenizer.encode(text, add_special_tokens=False).ids[:5]]


def test_a_vocabulary_whose_entries_cross_words_cuts_nothing() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1, "a▁": 2}, merges=[("a", "▁")]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Metaspace()
    assert find_cuts(tokenizer) is None


def added_after_nfkc() -> Tokenizer:
    tokenizer = byte_level(split_by(LLAMA3), normalizers.NFKC())
    tokenizer.add_tokens([AddedToken("e,", normalized=True)])
    return tokenizer


def merges_after(normalizer: normalizers.Normalizer, **parts: Any) -> Tokenizer:
    """BPE without a regex, of a few entries."""
    entries = ["▁", "a", "b", "e", ",", ".", "\uff0c", "aa", "e,", "a</w>", "e</w>", ".</w>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("e", ",")], **parts))
    tokenizer.normalizer = normalizer
    return tokenizer


def added_with_its_space_replaced() -> Tokenizer:
    tokenizer = merges_after(normalizers.Replace(" ", "▁"))
    tokenizer.add_tokens([AddedToken("e▁b", normalized=True)])
    return tokenizer


def upper_case_in_no_match() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"A": 0, ".": 1, "A.": 2}, merges=[("A", ".")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(GPT4O.split("(?i:", 1)[0]), "isolated")
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (added_after_nfkc(), "abcde\uff0cfoo bar"),
        (merges_after(normalizers.NFKC()), "aee\uff0caaaa"),
        (added_with_its_space_replaced(), "aae baaa"),
        (merges_after(normalizers.NFC(), ignore_merges=True), "aa.aaaa"),
        (merges_after(normalizers.NFC(), end_of_word_suffix="</w>"), "aae.aaaa"),
        (upper_case_in_no_match(), "AAA.AAAA"),
    ],
    ids=["added, NFKC", "merged, NFKC", "added, a space", "whole words", "ends of words", "no match"],
)
def test_what_joins_a_letter_and_a_mark_is_no_cut(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_tokens, "_CHARACTERS_A_TOKEN", 1)
    whole, cuts = tokenizer.encode(text, add_special_tokens=False).ids, find_cuts(tokenizer)
    for most in range(1, len(text)):
        assert first_ids(tokenizer, cuts, [text], most) == [whole[:most]]


def test_no_more_than_what_is_kept_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = changed(), []

    def counted(backend: Tokenizer, texts: list[str]) -> Any:
        lengths.append(sum(map(len, texts)))
        return all_ids(backend, texts)

    monkeypatch.setattr(first_tokens, "all_ids", counted)
    text = "sort the list, then read it. " * 20_000
    first_ids(tokenizer, find_cuts(tokenizer), [text] * 3, 32)
    assert sum(lengths) <= 3 * 32 * first_tokens._CHARACTERS_A_TOKEN
