"""Truncation never cuts the template, and what Stage I predicts has neither header nor instruction."""

import pytest
from tokenizers import AddedToken

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.template import Template, bake, instruct
from anchorembed.model.tokens import Lengths, PairTokenizer
from chat_templates import CASES
from tiny import SPECIALS, tiny_tokenizer


@pytest.mark.parametrize("case", CASES)
def test_truncated_texts_keep_the_whole_template(case: str) -> None:
    chat_template, special, template = CASES[case]
    tokenizer = bake(tiny_tokenizer(chat_template, special), template)
    pairs = PairTokenizer(tokenizer, Lengths(20, 20))
    short, long = pairs.templated(["sort", "sort the list " * 50], 20)
    assert tokenizer.decode(short) == template.bos + template.header + "sort" + template.suffix + template.end
    assert len(long) == 20
    (own,) = pairs.plain(["sort the list " * 50], 20)
    before = len(short) - len(pairs.plain(["sort"], 20)[0]) - _tokens_after(pairs, template)
    assert long == [*short[:before], *own, *short[len(short) - _tokens_after(pairs, template) :]]
    assert long[-1] == pairs.end_id == tokenizer.convert_tokens_to_ids(template.end)


def _tokens_after(pairs: PairTokenizer, template: Template) -> int:
    after = pairs.tokenizer(template.suffix + template.end, add_special_tokens=False, split_special_tokens=False)
    return len(after["input_ids"])


def test_a_text_without_spaces_is_cut_not_emptied() -> None:
    pairs = PairTokenizer(bake(tiny_tokenizer(), Template("", "", "", "</s>")), Lengths(8, 8))
    assert [len(ids) for ids in pairs.templated(["文" * 100], 8)] == [8]


def test_targets_have_neither_header_nor_instruction() -> None:
    chat_template, special, template = CASES["llama-3"]
    tokenizer = bake(tiny_tokenizer(chat_template, special), template)
    pairs = PairTokenizer(tokenizer, Lengths(40, 24))
    pair = TextPair("sort a list", "the values are sorted", ("delete the file",))
    (tokens,) = pairs.tokenize([pair], [instruct("find code")])
    assert (
        tokenizer.decode(tokens.query) == "<s><|start|>user<|stop|>\n\nInstruct: find code\nQuery: sort a list<|eot|>"
    )
    assert tokenizer.decode(tokens.document) == "<s><|start|>user<|stop|>\n\nthe values are sorted<|eot|>"
    assert tokenizer.decode(tokens.query_text) == "sort a list"
    assert tokenizer.decode(tokens.document_text) == "the values are sorted"
    assert [tokenizer.decode(negative) for negative in tokens.negatives] == [
        "<s><|start|>user<|stop|>\n\ndelete the file<|eot|>"
    ]


def test_both_sides_of_a_symmetric_task_get_its_instruction() -> None:
    pairs = PairTokenizer(bake(tiny_tokenizer(), Template("", "", "", "</s>")), Lengths(60, 60))
    pair = TextPair("sort a list", "order the rows", ("delete the file",))
    (tokens,) = pairs.tokenize([pair], ["Ask: "], ["Tell: "])
    shown = [pairs.tokenizer.decode(ids) for ids in (tokens.query, tokens.document, *tokens.negatives)]
    assert shown == ["Ask: sort a list</s>", "Tell: order the rows</s>", "Tell: delete the file</s>"]
    assert pairs.tokenizer.decode(tokens.document_text) == "order the rows"
    assert tokens.text == pair


def test_lengths_that_leave_no_room_are_refused() -> None:
    tokenizer = bake(tiny_tokenizer(), Template("<s>", "", "", "</s>"))
    with pytest.raises(InputError, match=r"data\.document_tokens: 2 leaves no room"):
        PairTokenizer(tokenizer, Lengths(8, 2))


def test_cut_texts_have_the_tokens_that_transformers_keeps() -> None:
    tokenizer = bake(tiny_tokenizer(), Template("<s>", "read: ", " :end", "</s>"))
    pairs, texts = (
        PairTokenizer(tokenizer, Lengths(30, 30)),
        ["sort the list, now. " * 900, "文字 " * 400, "x" * 900, ""],
    )
    assert pairs.templated(texts, 30) == tokenizer(texts, truncation=True, max_length=30)["input_ids"]
    assert list(pairs.count(texts)) == [
        len(ids) for ids in PairTokenizer(tokenizer, Lengths(9999, 9999)).templated(texts, 9999)
    ]


def test_what_others_do_with_the_tokenizer_changes_nothing() -> None:
    tokenizer = bake(tiny_tokenizer(), Template("<s>", "", "", "</s>"))
    pairs = PairTokenizer(tokenizer, Lengths(30, 30))
    before = pairs.templated(["sort the list"], 30)
    tokenizer(["sort the list", "a"], truncation=True, max_length=4, padding=True)
    assert pairs.templated(["sort the list"], 30) == before
    assert list(pairs.count(["sort the list"])) == [len(before[0])]


@pytest.mark.parametrize("case", ["qwen", "llama-3", "mistral-control-tokens", "base"])
def test_special_tokens_in_a_text_are_text(case: str) -> None:
    chat_template, special, template = CASES[case]
    tokenizer = bake(tiny_tokenizer(chat_template, special), template)
    pairs = PairTokenizer(tokenizer, Lengths(200, 200))
    named = tokenizer.all_special_tokens
    text = "sort " + " ".join([*named, *(f"{name}list{name}" for name in named)])
    special_ids, ids = set(tokenizer.all_special_ids), pairs.plain([text], 200)[0]
    assert pairs.end_id in special_ids
    assert not special_ids & set(ids)
    assert tokenizer.decode(ids) == text
    (tokens,) = pairs.tokenize([TextPair(text, text, (text,))], [instruct(template.end)])
    for side in (tokens.query, tokens.document, *tokens.negatives):
        assert side.count(pairs.end_id) == 1
        assert side[-1] == pairs.end_id
    assert tokens.query_text == tokens.document_text == ids


def test_a_template_s_tokens_are_special_whatever_the_tokenizer_calls_them() -> None:
    tokenizer = tiny_tokenizer(pad_token="<s>", **SPECIALS)
    tokenizer.add_tokens([AddedToken("<|end|>", special=False), AddedToken("<|user|>", special=False)])
    pairs = PairTokenizer(bake(tokenizer, Template("", "<|user|>", "", "<|end|>")), Lengths(60, 60))
    (ids,) = pairs.templated(["a <|end|> <|user|> b"], 60)
    assert ids.count(pairs.end_id) == ids.count(ids[0]) == 1
