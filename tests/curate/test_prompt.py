"""Prompt files and the reading of replies."""

from pathlib import Path

import pytest

from anchorembed.curate.prompt import LONGEST_DOCUMENT, default_prompt, ends_in_thoughts, read_prompt, read_reply
from anchorembed.errors import InputError


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_default_prompt_is_a_file_that_can_be_changed(line_end: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(default_prompt(), encoding="utf-8", newline=line_end)
    assert read_prompt(tmp_path / "mine.txt") == read_prompt(None)
    messages = read_prompt(None).messages("The heart {count} pumps.", 3)
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"].endswith("The heart {count} pumps."), "a document is text"
    assert "Write 3 different" in messages[-1]["content"]
    assert [len(message["content"].splitlines()) for message in messages if message["role"] == "assistant"] == [3, 3]


def test_a_file_without_turns_is_a_user_s(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Ask of: {document}", encoding="utf-8")
    assert read_prompt(tmp_path / "p.txt").messages("x", 1) == [{"role": "user", "content": "Ask of: x"}]


def test_a_file_of_another_encoding_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("About {document}", encoding="utf-16")
    with pytest.raises(InputError, match=r"prompt\.txt: the text is UTF-16, not UTF-8"):
        read_prompt(path)


def test_a_long_document_is_cut() -> None:
    (*_, last) = read_prompt(None).messages("a" * 5000, 1)
    assert last["content"].count("a" * LONGEST_DOCUMENT) == 1
    assert "a" * (LONGEST_DOCUMENT + 1) not in last["content"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("### user\nask", "its last turn is not a user's with {document}"),
        ("### user\n{document}\n### assistant\nfine", "its last turn is not a user's"),
        ("hello\n### user\n{document}", "text before its first turn"),
        ("", "its last turn is not a user's"),
    ],
)
def test_what_is_no_prompt_is_refused(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=fault):
        read_prompt(tmp_path / "p.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompt(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("reply", "queries", "is_cut_off"),
    [
        ("1. how to sort\n2) sort a list\n3. more", ["how to sort", "sort a list"], False),
        ('- "How do I sort?"\n\n* **order a list**', ["How do I sort?", "order a list"], False),
        ("Query 1: sort   a list\nquestion: why", ["sort a list", "why"], False),
        ("<think>\nlet me see\n</think>\nsort a list", ["sort a list"], False),
        ("Okay, ...\n</think>\nsort a list\norder it", ["sort a list", "order it"], False),
        ("\n<think> never ends", [], True),
        ("<think>first</think>\n<think>then", [], True),
        ("what does <think> mean\nend of thoughts", ["what does <think> mean", "end of thoughts"], False),
        ("2024 tax rates\n3d printing at home", ["2024 tax rates", "3d printing at home"], False),
        ("2.5 inch disk\n10:30 train to Bern", ["2.5 inch disk", "10:30 train to Bern"], False),
        ("-5 degrees in kelvin\n1.what is \ud83d", ["-5 degrees in kelvin", "what is ?"], False),
        (" \n \n", [], False),
    ],
)
def test_replies_become_queries(reply: str, queries: list[str], is_cut_off: bool) -> None:
    assert read_reply(reply, 2) == queries
    assert ends_in_thoughts(reply) == is_cut_off
