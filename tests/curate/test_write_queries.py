"""Queries are kept as they come: what was written is not asked for again, what changed is, damage costs a line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from anchorembed.curate.prompt import Messages, read_prompt
from anchorembed.curate.write_queries import BATCH, write_queries
from anchorembed.curate.writers import Reply
from anchorembed.data.documents import Document
from anchorembed.errors import InputError


@dataclass
class Parrot:
    """Writes a document's last words, and stops at will."""

    settings: str = "parrot"
    left: int = 1000
    replies: dict[str, str] = field(default_factory=dict)  # by word, instead of its own
    asked: list[str] = field(default_factory=list)

    def reply(self, conversations: Sequence[Messages], most_tokens: int) -> list[Reply]:
        if len(conversations) > self.left:
            raise InputError("stopped")
        self.left -= len(conversations)
        words = [messages[-1]["content"].split()[-1] for messages in conversations]
        self.asked += words
        return [Reply(self.replies.get(word, f"1. where is {word}\n2. what is {word}"), 5, 2) for word in words]


DOCUMENTS = [Document(f"d{number}", f"a text of t{number}") for number in range(40)]


def test_each_document_gets_its_queries(tmp_path: Path) -> None:
    steps: list[tuple[int, int, int]] = []
    written = write_queries(
        DOCUMENTS, Parrot(), read_prompt(None), 2, tmp_path / "q.jsonl", lambda *step: steps.append(step)
    )
    assert written.queries == [[f"where is t{number}", f"what is t{number}"] for number in range(40)]
    assert (written.documents, written.tokens_in, written.tokens_out) == (40, 200, 80)
    assert steps == [(0, 0, 0), (16, 80, 32), (16, 80, 32), (8, 40, 16)]
    assert "queries written for 40 documents (0 had theirs)" in str(written)
    assert "200 tokens read, 80 tokens written" in str(written)


def test_a_stopped_run_goes_on_after_its_last_batch(tmp_path: Path) -> None:
    file, whole = tmp_path / "q.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(InputError, match="stopped"):
        write_queries(DOCUMENTS, Parrot(left=BATCH), read_prompt(None), 2, file)
    with file.open("ab") as stream:
        stream.write(b'{"id": "d16", "key": "0')  # as a kill leaves it
    rest = Parrot()
    written = write_queries(DOCUMENTS, rest, read_prompt(None), 2, file)
    assert rest.asked == [f"t{number}" for number in range(16, 40)]
    assert written.queries == write_queries(DOCUMENTS, Parrot(), read_prompt(None), 2, whole).queries
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in whole.read_text().splitlines()]


def test_what_decides_queries_is_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    (tmp_path / "p.txt").write_text("other {document}", encoding="utf-8")
    write_queries(DOCUMENTS, Parrot(), read_prompt(None), 2, file)
    changed = [Document("d0", "another t99"), *DOCUMENTS[1:], Document("new", DOCUMENTS[0].text)]
    again = Parrot()
    write_queries(changed, again, read_prompt(None), 2, file)
    assert again.asked == ["t99", "t0"]
    for writer, prompt, count in ((Parrot("p2"), None, 2), (Parrot(), tmp_path / "p.txt", 2), (Parrot(), None, 1)):
        write_queries(DOCUMENTS, writer, read_prompt(prompt), count, file)
        assert len(writer.asked) == 40
    last = Parrot()
    assert str(write_queries(DOCUMENTS, last, read_prompt(None), 2, file)).endswith("were written before")
    assert last.asked == []


def test_a_reply_that_ends_in_thoughts_is_not_kept(tmp_path: Path) -> None:
    thinking = Parrot(replies={"t20": "<think>Okay, the user wants " + "more " * 100})
    with pytest.raises(
        InputError, match=r"reply '<think>Okay.{180,190}' ends in its thoughts, at the limit of 64 tokens"
    ):
        write_queries(DOCUMENTS, thinking, read_prompt(None), 2, tmp_path / "q.jsonl")
    rest = Parrot()
    write_queries(DOCUMENTS, rest, read_prompt(None), 2, tmp_path / "q.jsonl")
    assert rest.asked == ["t20", *(f"t{number}" for number in range(32, 40))]


def test_a_writer_without_a_query_is_stopped_after_the_first_batch_and_asked_again(tmp_path: Path) -> None:
    no_query = {f"t{number}": "- " for number in range(20)}
    for _ in range(2):
        useless = Parrot(replies=no_query)
        with pytest.raises(InputError, match=r"first 16 replies hold no query\. One is '- '\. Change --prompt"):
            write_queries(DOCUMENTS, useless, read_prompt(None), 2, tmp_path / "q.jsonl")
        assert len(useless.asked) == BATCH
    write_queries(DOCUMENTS[20:], Parrot(), read_prompt(None), 2, tmp_path / "q.jsonl")
    written = write_queries(DOCUMENTS, Parrot(replies=no_query), read_prompt(None), 2, tmp_path / "q.jsonl")
    assert written.queries[19:21] == [[], ["where is t20", "what is t20"]], "others have queries"


@pytest.mark.parametrize("line", ["[]", "{}", '{"id": "d0", "key": 1, "queries": 3}', "\x00", "null", '"a"'])
def test_damaged_lines_do_not_count(line: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line, encoding="utf-8")
    assert write_queries(DOCUMENTS[:2], Parrot(), read_prompt(None), 1, tmp_path / "q.jsonl").documents == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").mkdir()
    with pytest.raises(InputError, match=r"q\.jsonl: cannot be"):
        write_queries(DOCUMENTS[:2], Parrot(), read_prompt(None), 1, tmp_path / "q.jsonl")
