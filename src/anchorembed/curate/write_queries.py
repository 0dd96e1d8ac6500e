"""Have queries written for documents, and append them to a file: a killed run continues after its last batch."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anchorembed.curate.prompt import Prompt, ends_in_thoughts, read_reply
from anchorembed.curate.writers import TOKENS_A_QUERY, Reply, Writer
from anchorembed.data.documents import Document
from anchorembed.errors import InputError, first_line
from anchorembed.system.files import hash_texts

BATCH = 16  # documents whose queries are written, and appended to the file, together
_CHARACTERS = 200  # of a reply in a message


@dataclass(frozen=True, slots=True)
class Written:
    """Queries of each document, in the documents' order; number of documents, tokens and time of this run alone."""

    queries: list[list[str]]
    documents: int
    tokens_in: int
    tokens_out: int
    seconds: float

    def __str__(self) -> str:
        if not self.documents:
            return f"queries of {len(self.queries):,} documents were written before"
        rate = self.documents / max(self.seconds, 1e-9)
        return (
            f"queries written for {self.documents:,} documents ({len(self.queries) - self.documents:,} had theirs): "
            f"{rate:.2f} documents a second, {self.tokens_in:,} tokens read, {self.tokens_out:,} tokens written"
        )


def write_queries(
    documents: Sequence[Document],
    writer: Writer,
    prompt: Prompt,
    count: int,
    file: Path,
    progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Written:
    """Have ``count`` queries written for each document that has none in ``file`` yet, and append them to it.

    The file has a line for each document. A line is used for a document of the same id and text, with the same writer,
    prompt and count; damaged lines are ignored. ``progress`` is called with the documents done, and the tokens read and
    written, since the last call.

    Raises:
        InputError: as the writer does; if a reply ends in its thoughts, or no document of the first batch gets a query,
            both of which are not appended; or if the file cannot be written.
    """
    settings = json.dumps([writer.settings, prompt.turns, count])
    keys = [hash_texts([settings, "\n", document.text])[:32] for document in documents]
    written = _read(file)
    todo = [row for row, document in enumerate(documents) if (document.id, keys[row]) not in written]
    progress(len(documents) - len(todo), 0, 0)
    has_queries = any(written.get((document.id, key)) for document, key in zip(documents, keys, strict=True))
    started, tokens_in, tokens_out = time.monotonic(), 0, 0
    for rows in (todo[start : start + BATCH] for start in range(0, len(todo), BATCH)):
        conversations = [prompt.messages(documents[row].text, count) for row in rows]
        replies = writer.reply(conversations, TOKENS_A_QUERY * count)
        complete = [each for each in zip(rows, replies, strict=True) if not ends_in_thoughts(each[1].text)]
        lines = []
        for row, reply in complete:
            queries = read_reply(reply.text, count)
            has_queries |= bool(queries)
            written[documents[row].id, keys[row]] = queries
            costs = {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
            lines.append(json.dumps({"id": documents[row].id, "key": keys[row], "queries": queries} | costs) + "\n")
        if has_queries:
            _append(file, "".join(lines))
        _check(replies, has_queries, TOKENS_A_QUERY * count)
        batch_in, batch_out = sum(reply.tokens_in for reply in replies), sum(reply.tokens_out for reply in replies)
        tokens_in, tokens_out = tokens_in + batch_in, tokens_out + batch_out
        progress(len(rows), batch_in, batch_out)
    queries_of = [written[document.id, key] for document, key in zip(documents, keys, strict=True)]
    return Written(queries_of, len(todo), tokens_in, tokens_out, time.monotonic() - started)


def _check(replies: Sequence[Reply], has_queries: bool, limit: int) -> None:
    """Refuse to go on with a writer whose replies end in thoughts, or which has written no query yet."""
    if cut_off := [reply.text for reply in replies if ends_in_thoughts(reply.text)]:
        raise InputError(
            f"The writer's reply {cut_off[0][:_CHARACTERS]!r} ends in its thoughts, at the limit of {limit} tokens. "
            "Switch them off where the model is served, or choose another writer."
        )
    if not has_queries:
        raise InputError(
            f"The writer's first {len(replies)} replies hold no query. One is {replies[0].text[:_CHARACTERS]!r}. "
            "Change --prompt, or choose another writer."
        )


def _read(file: Path) -> dict[tuple[str, str], list[str]]:
    """Queries by id and key; lines that a crash has cut off are left out."""
    written: dict[tuple[str, str], list[str]] = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValueError, LookupError, TypeError):
            record = json.loads(line)
            written[str(record["id"]), str(record["key"])] = [str(query) for query in record["queries"]]
    return written


def _append(file: Path, lines: str) -> None:
    """Append lines and flush them to the disk; if the file ends in an incomplete line, begin a new one."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                lines = lines if stream.read(1) == b"\n" else f"\n{lines}"
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({first_line(error)}). Free space, or choose another.") from error
