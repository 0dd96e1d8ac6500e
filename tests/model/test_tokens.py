"""The template is derived from any chat template, the same on any date, and truncation never cuts it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.template import Template, bake, derive_template, instruct
from anchorembed.model.tokens import Lengths, PairTokenizer
from tiny import tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}<|start|>system<|stop|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
CASES = {
    "llama-3": (
        LLAMA3,
        ("<|start|>", "<|stop|>", "<|eot|>"),
        Template("<s>", "<|start|>user<|stop|>\n\n", "", "<|eot|>"),
    ),
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>"), Template("", "<|im_start|>user\n", "", "<|im_end|>")),
    "mistral": (MISTRAL, (), Template("<s>", "[INST] ", "[/INST]", "</s>")),
    "mistral-control-tokens": (MISTRAL, ("[INST]", "[/INST]"), Template("<s>", "[INST] ", "[/INST]", "</s>")),
    "gemma": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        Template("<s>", "<start_of_turn>user\n", "", "<end_of_turn>"),
    ),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|end|>"), Template("", "<|user|>\n", "", "<|end|>")),
    "base": (None, (), Template("<s>", "", "", "</s>")),
}


@pytest.mark.parametrize("case", CASES)
def test_derivation(case: str) -> None:
    chat_template, special, expected = CASES[case]
    assert derive_template(tiny_tokenizer(chat_template, special)) == expected


def test_smollm_whose_bos_is_its_user_marker() -> None:
    tokenizer = tiny_tokenizer(QWEN, (), bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert derive_template(tokenizer) == Template("", "<|im_start|>user\n", "", "<|im_end|>")


def test_base_without_bos() -> None:
    assert derive_template(tiny_tokenizer(eos_token="</s>")) == Template("", "", "", "</s>")


@pytest.mark.parametrize(
    ("chat_template", "names"),
    [
        ("{{ raise_exception('no') }}", {"eos_token": "</s>"}),
        ("nothing", {"eos_token": "</s>"}),
        (None, {"pad_token": "x"}),
    ],
)
def test_what_cannot_be_derived_says_how_to_give_it(chat_template: str | None, names: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"Set model\.template"):
        derive_template(tiny_tokenizer(chat_template, (), **names))


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
    return len(pairs.tokenizer(template.suffix + template.end, add_special_tokens=False)["input_ids"])


def test_a_text_without_spaces_is_cut_not_emptied() -> None:
    pairs = PairTokenizer(bake(tiny_tokenizer(), Template("", "", "", "</s>")), Lengths(8, 8))
    assert [len(ids) for ids in pairs.templated(["文" * 100], 8)] == [8]


def test_targets_have_neither_header_nor_instruction() -> None:
    chat_template, special, template = CASES["llama-3"]
    tokenizer = bake(tiny_tokenizer(chat_template, special), template)
    pairs = PairTokenizer(tokenizer, Lengths(40, 24))
    pair = TextPair("sort a list", "the values are sorted", ("delete the file",))
    (tokens,) = pairs.pairs([pair], [instruct("find code")])
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
    (tokens,) = pairs.pairs([pair], ["Ask: "], ["Tell: "])
    shown = [pairs.tokenizer.decode(ids) for ids in (tokens.query, tokens.document, *tokens.negatives)]
    assert shown == ["Ask: sort a list</s>", "Tell: order the rows</s>", "Tell: delete the file</s>"]
    assert pairs.tokenizer.decode(tokens.document_text) == "order the rows"
    assert tokens.text == pair


def test_saved_and_reloaded_it_is_the_same(tmp_path: Path) -> None:
    chat_template, special, template = CASES["qwen"]
    tokenizer = bake(tiny_tokenizer(chat_template, special), template)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "sort the list", "文 " * 30):
        assert (
            again(text, truncation=True, max_length=12)["input_ids"]
            == (tokenizer(text, truncation=True, max_length=12)["input_ids"])
        )


def test_lengths_that_leave_no_room_are_refused() -> None:
    tokenizer = bake(tiny_tokenizer(), Template("<s>", "", "", "</s>"))
    with pytest.raises(InputError, match=r"data\.document_tokens: 2 leaves no room"):
        PairTokenizer(tokenizer, Lengths(8, 2))


def test_an_end_that_is_no_token_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.template\.end: '<nope>'"):
        bake(tiny_tokenizer(), Template("", "", "", "<nope>"))
