"""Corpora and texts: read as they are, with titles and ids, and every fault names its file and line."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anchorembed.data.documents import Document, read_corpus, read_texts
from anchorembed.errors import InputError
from text_files import lines


def test_a_corpus_joins_titles_and_keeps_empty_documents(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "corpus.jsonl",
        {"_id": "a", "title": "T", "text": "x"},
        {"_id": 7, "title": "", "text": "y", "metadata": {}},
        {"_id": "c", "title": None, "text": "z"},
        {"_id": "d", "title": "only"},
        {"_id": "e", "title": "", "text": ""},
    )
    assert list(read_corpus(path)) == [
        Document("a", "T\nx"),
        Document("7", "y"),
        Document("c", "z"),
        Document("d", "only\n"),
        Document("e", ""),
    ]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            '{"_ids": "a", "text": "x"}',
            "no \"_id\" or \"id\" or \"doc_id\" here, only '_ids', 'text'. Did you mean '_id'?",
        ),
        (
            '{"_ids": "a", "txt": "x"}',
            'no "_id" or "id" or "doc_id" and no "text" or "title" here, only '
            "'_ids', 'txt'. Did you mean '_id'? Did you mean 'text'?",
        ),
        ('{"_id": 1.5, "text": "x"}', '"_id" is a number, not text.'),
        ('{"_id": true, "text": "x"}', '"_id" is a boolean, not text.'),
        ('{"_id": "", "text": "x"}', '"_id" is empty.'),
        ('{"_id": "a", "txt": "x"}', "no \"text\" or \"title\" here, only '_id', 'txt'. Did you mean 'text'?"),
        ('{"_id": "a", "text": 3}', '"text" is a number, not text.'),
        (
            '{"_id": "a", "title": "\\udc00", "text": ""}',
            '"title" is not valid UTF-8 at character 1 (a lone surrogate).',
        ),
        ('{"_id": "first", "text": "x"}', "the id 'first' is already taken by an earlier line."),
        ('{"_id": nope}', "the line is not valid JSON (Expecting value, column 9)."),
    ],
)
def test_bad_corpus_lines(tmp_path: Path, row: str, what: str) -> None:
    path = lines(tmp_path / "corpus.jsonl", {"_id": "first", "text": "x"}, row)
    with pytest.raises(InputError) as caught:
        list(read_corpus(path))
    assert str(caught.value) == f"{path}:2: {what} Correct or remove the line."


def test_texts_may_go_without_ids(tmp_path: Path) -> None:
    mixed = lines(tmp_path / "t.jsonl", {"text": "x"}, "", {"text": "y"}, {"_id": "c", "title": "T", "text": "z"})
    assert list(read_texts(mixed)) == [Document("1", "x"), Document("3", "y"), Document("c", "T\nz")]
    plain = tmp_path / "t.txt.gz"
    plain.write_bytes(gzip.compress(b"\xef\xbb\xbfx \r\n\r\n  y"))
    assert list(read_texts(plain)) == [Document("1", "x "), Document("3", "  y")]
    (tmp_path / "t.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(InputError, match=r't\.txt:2: "text" is not valid UTF-8'):
        list(read_texts(tmp_path / "t.txt"))
    with pytest.raises(InputError, match=r"t\.csv: texts cannot be read from this\. Give \.jsonl or \.txt"):
        read_texts(lines(tmp_path / "t.csv", "x"))


def test_a_table_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"faq\.csv: a corpus cannot be read from this\. Give \.jsonl"):
        read_corpus(lines(tmp_path / "faq.csv", "query,positive"))


@pytest.mark.parametrize(("read", "what"), [(read_corpus, "no document"), (read_texts, "no text")])
def test_empty_files_of_documents_are_an_error(
    tmp_path: Path, read: Callable[[Path], Iterator[Document]], what: str
) -> None:
    path = lines(tmp_path / "empty.jsonl", "")
    with pytest.raises(InputError, match=f"empty.jsonl: {what}. Give at least one line."):
        list(read(path))


@pytest.mark.parametrize("read", [read_corpus, read_texts])
def test_ids_have_the_same_names_wherever_documents_are_read(
    tmp_path: Path, read: Callable[[Path], Iterator[Document]], said: list[str]
) -> None:
    rows = [{"id": "a", "text": "x"}, {"doc_id": 7, "text": "y"}, {"id": "no", "_id": "b", "text": "z", "url": "u"}]
    path = lines(tmp_path / "corpus.jsonl", *rows)
    assert list(read(path)) == [Document("a", "x"), Document("7", "y"), Document("b", "z")]
    assert said == [f"{path}: columns that are not used: 'id', 'doc_id', 'url'"]
