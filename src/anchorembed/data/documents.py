"""Texts with ids: corpus files, and files of texts to encode."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anchorembed.data.formats import existing, json_rows, lines, suffix_of
from anchorembed.data.rows import BadRow, Row, Rows, checked, missing, not_empty, optional_text, required_text
from anchorembed.errors import InputError

ID_NAMES = ("_id", "id", "doc_id")  # the first of these that a row has is its id
_TEXT_NAMES = ("title", "text", "metadata")  # BEIR's corpora have metadata, which is ignored


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id; a title, if there is one, is the text's first line."""

    id: str
    text: str


class Documents(Protocol):
    """Documents in order, in memory or on disk, that can be iterated over more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Document]: ...


def read_corpus(path: Path) -> Iterator[Document]:
    """Stream a corpus, JSONL of ``_id`` (or ``id``, ``doc_id``), ``title`` and ``text``, as BEIR's are.

    Raises:
        InputError: on a bad line, a repeated id, a table or plain text, or if there is no document.
    """
    if suffix_of(path) in (".csv", ".tsv", ".parquet", ".txt"):
        raise InputError(f'{path}: a corpus cannot be read from this. Give .jsonl, {{"_id": ..., "text": ...}} a line.')
    return not_empty(_documents(existing(path), needs_id=True), lambda: f"{path}: no document. Give at least one line.")


def read_texts(path: Path) -> Iterator[Document]:
    """Stream texts to encode: corpus lines, lines with only ``text``, or a ``.txt`` with one text a line.

    The id of a text without one is its line number, from 1.

    Raises:
        InputError: on a bad line, a repeated id, an unknown format, or if there is no text.
    """
    suffix = suffix_of(existing(path))
    if suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: texts cannot be read from this. Give .jsonl or .txt (each also with .gz).")
    texts = _plain_texts(path) if suffix == ".txt" else _documents(path, needs_id=False)
    return not_empty(texts, lambda: f"{path}: no text. Give at least one line.")


def _documents(path: Path, *, needs_id: bool) -> Iterator[Document]:
    seen: set[str] = set()

    def make(line: int, row: Row) -> Document:
        wanted = [ID_NAMES, ("text", "title")] if needs_id else [("text", "title")]
        if lacking := [names for names in wanted if not any(name in row for name in names)]:
            raise missing(lacking, list(row))
        document = Document(_id(row, line), _titled_text(row))
        if document.id in seen:
            raise BadRow(f"the id {document.id!r} is already taken by an earlier line")
        seen.add(document.id)
        return document

    def used(names: Collection[str]) -> tuple[str, ...]:
        return (*_TEXT_NAMES, _id_name(names))

    return checked(path, [(path, json_rows(path))], make, used, cure="Correct or remove the line.")


def _id_name(names: Collection[str]) -> str:
    """The name of a row's id column, or an empty string."""
    return next((name for name in ID_NAMES if name in names), "")


def _id(row: Row, default: int) -> str:
    name = _id_name(row.keys())
    if not name:
        return str(default)
    value = row[name]
    return str(value) if type(value) is int else required_text(row, name)


def _titled_text(row: Row) -> str:
    """Join title and text. One may be missing, and both may be empty, as BEIR's corpora have empty documents."""
    title, text = (optional_text(row, key) for key in ("title", "text"))
    return f"{title}\n{text}" if title.strip() else text


def _plain_texts(path: Path) -> Iterator[Document]:
    rows: Rows = ((line, {"text": text.rstrip("\r\n")}) for line, text in lines(path) if text.strip())

    def make(line: int, row: Row) -> Document:
        return Document(str(line), required_text(row, "text"))

    return checked(path, [(path, rows)], make, lambda names: names, cure="Correct the line.")
