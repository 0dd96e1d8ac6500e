"""The template is derived from any chat template, the same on any date, and baked into the tokenizer."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from anchorembed.errors import InputError
from anchorembed.model.template import Template, bake, derive_template
from chat_templates import CASES, QWEN
from tiny import tiny_tokenizer


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


def test_an_end_that_is_no_token_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.template\.end: '<nope>'"):
        bake(tiny_tokenizer(), Template("", "", "", "<nope>"))


def test_a_baked_tokenizer_puts_each_part_where_it_belongs() -> None:
    baked = bake(tiny_tokenizer(), Template("<s>", "user: ", " over", "</s>"))
    assert baked.decode(baked("sort a list")["input_ids"]) == "<s>user: sort a list over</s>"
