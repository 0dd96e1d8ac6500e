"""Text from disk, validated and streamed: one pass, one record at a time, every fault with its file and line.

Rows of any format (`rows`) become pairs, texts and retrieval tests here.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

from anchorembed.errors import InputError
from anchorembed.rows import (
    BadRow,
    Row,
    Rows,
    checked,
    dataset_rows,
    existing,
    json_list,
    json_rows,
    lines,
    listed,
    missing,
    not_empty,
    optional_text,
    required_text,
    split_of_pairs,
    suffix_of,
    table_rows,
)

QUERY_NAMES = ("query", "anchor")
POSITIVE_NAMES = ("positive", "document")
NEGATIVE_NAMES = ("negative", "negatives")
SCORES_NAME = "scores"
FORMATS = (
    ".jsonl, .csv, .tsv (each also with .gz), .parquet, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) "
    "or a folder written by datasets' save_to_disk"
)
_LARGEST_SCORE = 1e6
_QRELS_HEADER = ["query-id", "corpus-id", "score"]
_KNOWN_NAMES = frozenset((*QUERY_NAMES, *POSITIVE_NAMES, *NEGATIVE_NAMES, SCORES_NAME))


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query and the text that answers it; ``line`` is its 1-based line or row in its file.

    ``scores``, where there are any, are another model's: of the positive, then of each negative.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    source: str = ""
    line: int = 0
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id; a title, where there is one, is the text's first line."""

    id: str
    text: str


class Documents(Protocol):
    """Documents in order, in memory or on disk, to be gone through as often as needed."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class Collection:
    """A retrieval test: what is searched, what is asked, and ``qrels[query id][document id]`` = graded relevance."""

    name: str
    documents: Documents
    queries: tuple[Document, ...]
    qrels: dict[str, dict[str, int]]


def read_pairs(
    path: Path, *, source: str = "", skip_bad: bool = False, on_skip: Callable[[str], None] | None = None
) -> Iterator[TextPair]:
    """Stream the pairs of a file or folder in any of `FORMATS`.

    A bad row raises InputError; with ``skip_bad`` it is dropped and ``on_skip`` gets a message that names its place.
    A missing column, a damaged file and a file without one usable pair raise InputError either way.
    """
    place, rows = _pair_rows(path)
    pairs = checked(
        place,
        rows,
        lambda line, row: _pair(row, source, line),
        cure="Remove the line, or drop and count such lines by data.skip_bad or --skip-bad.",
        on_bad=(on_skip or (lambda _message: None)) if skip_bad else None,
    )
    return not_empty(pairs, f"{place}: no usable pair. Give at least one query with its positive.")


def read_corpus(path: Path) -> Iterator[Document]:
    """Stream a BEIR corpus (JSONL of ``_id``, ``title``, ``text``); any fault or repeated id raises InputError."""
    return not_empty(_documents(existing(path), needs_id=True), f"{path}: no document. Give at least one line.")


def read_texts(path: Path) -> Iterator[Document]:
    """Stream texts to encode: corpus lines, lines with only ``text``, or a ``.txt`` with one text a line.

    A text without an id is called by its 1-based line number. Any fault or repeated id raises InputError.
    """
    suffix = suffix_of(existing(path))
    if suffix == ".txt":
        texts = _plain_texts(path)
    elif suffix == ".jsonl":
        texts = _documents(path, needs_id=False)
    else:
        raise InputError(f"{path}: texts cannot be read from this. Give .jsonl or .txt (each also with .gz).")
    return not_empty(texts, f"{path}: no text. Give at least one line.")


def read_collection(
    folder: Path, split: str = "test", hold: Callable[[Path], Documents] = lambda corpus: tuple(read_corpus(corpus))
) -> Collection:
    """Read a BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` (each also .gz) and ``qrels/<split>.tsv``.

    Only queries with a judgement above 0 are kept. A judgement that names an unknown id raises InputError. ``hold``
    reads the corpus, by default into memory.
    """
    qrels_path = existing(folder) / "qrels" / f"{split}.tsv"
    if not qrels_path.is_file():
        raise InputError(f"{qrels_path}: no such file. {listed('Splits there', _splits(folder))}")
    documents = hold(_beir_file(folder, "corpus"))
    queries = tuple(read_corpus(_beir_file(folder, "queries")))
    qrels = _qrels(qrels_path, {query.id for query in queries}, {document.id for document in documents})
    kept = {query: scores for query, scores in qrels.items() if max(scores.values()) > 0}
    if not kept:
        raise InputError(f"{qrels_path}: no judgement above 0. Give at least one relevant document.")
    return Collection(folder.resolve().name, documents, tuple(query for query in queries if query.id in kept), kept)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line, gzipped if the name ends in .gz, whole or not at all; return the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # A fixed time stamp and no file name in the gzip header: the same rows give the same bytes.
    with whole_file(path) as partial, partial.open("wb") as raw:
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place when all went well, and is gone otherwise."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as of a full disk: say which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """See that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Rows to records


def _pair(row: Row, source: str, line: int) -> TextPair:
    query, positive, negative = _columns(list(row))
    negatives = _negatives(row, negative)
    scores = _scores(row.get(SCORES_NAME), 1 + len(negatives))
    return TextPair(required_text(row, query), required_text(row, positive), negatives, source, line, scores)


def _columns(found: list[str]) -> tuple[str, str, str | None]:
    """Name the query, positive and (optional) negative columns among those found."""
    query, positive, negative = (_one_of(names, found) for names in (QUERY_NAMES, POSITIVE_NAMES, NEGATIVE_NAMES))
    if query is None or positive is None:
        raise missing(QUERY_NAMES if query is None else POSITIVE_NAMES, found)
    return query, positive, negative


def _one_of(names: tuple[str, str], found: Iterable[str]) -> str | None:
    here = [name for name in names if name in found]
    if len(here) > 1:
        raise BadRow(f'both "{names[0]}" and "{names[1]}" are given', " Keep one of them.")
    return here[0] if here else None


def _negatives(row: Row, key: str | None) -> tuple[str, ...]:
    """Read the negatives of a row; an absent column, null or an empty list is none, an empty text is a fault.

    In CSV a list stands in a cell as JSON.
    """
    value = None if key is None else row[key]
    if key is None or value is None:
        return ()
    listed = json_list(value) if isinstance(value, str) else value
    if isinstance(listed, list):
        return tuple(required_text({key: item}, key) for item in listed)
    return (required_text(row, key),)


def _scores(value: object, texts: int) -> tuple[float, ...]:
    """Read given scores, one of the positive and one of each negative; absent, null or empty is none.

    In CSV the list stands in a cell as JSON.
    """
    if isinstance(value, str):
        value = json_list(value)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != texts:
        raise BadRow(f'"{SCORES_NAME}" must be a list: a number for the positive and for each negative, {texts} here')
    if not all(type(score) in (int, float) and abs(score) <= _LARGEST_SCORE for score in value):
        raise BadRow(f'"{SCORES_NAME}" must hold numbers between -{_LARGEST_SCORE:g} and {_LARGEST_SCORE:g}')
    return tuple(map(float, value))


# Documents


def _documents(path: Path, *, needs_id: bool) -> Iterator[Document]:
    seen: set[str] = set()

    def make(line: int, row: Row) -> Document:
        document = Document(_id(row, None if needs_id else line), _titled_text(row))
        if document.id in seen:
            raise BadRow(f"the id {document.id!r} is already taken by an earlier line")
        seen.add(document.id)
        return document

    return checked(path, json_rows(path), make, cure="Correct or remove the line.")


def _id(row: Row, default: int | None) -> str:
    if "_id" not in row:
        if default is None:
            raise missing(("_id",), list(row))
        return str(default)
    value = row["_id"]
    return str(value) if type(value) is int else required_text(row, "_id")


def _titled_text(row: Row) -> str:
    """Join title and text; both may be empty (BEIR corpora hold empty documents), but not both missing."""
    if "text" not in row and "title" not in row:
        raise missing(("text", "title"), list(row))
    title, text = (optional_text(row, key) for key in ("title", "text"))
    return f"{title}\n{text}" if title.strip() else text


def _plain_texts(path: Path) -> Iterator[Document]:
    rows: Rows = ((line, {"text": text.rstrip("\r\n")}) for line, text in lines(path) if text.strip())
    return checked(
        path, rows, lambda line, row: Document(str(line), required_text(row, "text")), cure="Correct the line."
    )


# Files to rows


def _pair_rows(path: Path) -> tuple[Path, Rows]:
    """Choose the reader by suffix or by what a folder holds; the place is the file that line numbers refer to."""
    if existing(path).is_dir():
        return _folder_rows(path)
    rows = table_rows(path, _pair_columns, NEGATIVE_NAMES)
    if rows is None:
        raise InputError(f"{path}: unknown format. Give {FORMATS}.")
    return path, rows


def _pair_columns(names: list[str]) -> list[str]:
    _columns(names)
    return [name for name in names if name in _KNOWN_NAMES]


def _folder_rows(folder: Path) -> tuple[Path, Rows]:
    if (folder / "qrels").is_dir():
        qrels = folder / "qrels" / f"{split_of_pairs(f'{folder}/qrels', _splits(folder))}.tsv"
        return qrels, _beir_rows(folder, qrels)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return folder, dataset_rows(folder, _pair_columns)
    raise InputError(f"{folder}: a folder of unknown format. Give {FORMATS}.")


# BEIR folders


def _beir_rows(folder: Path, qrels: Path) -> Rows:
    """Pair each query with each document judged above 0; only the texts that pairs need are held in memory."""
    judged = [(line, query, document) for line, query, document, score in _judgements(qrels) if score > 0]
    wanted = {query for _, query, _ in judged}, {document for _, _, document in judged}
    queries, documents = (
        {document.id: document.text for document in read_corpus(_beir_file(folder, name)) if document.id in ids}
        for name, ids in zip(("queries", "corpus"), wanted, strict=True)
    )
    for line, query, document in judged:
        if query not in queries or document not in documents:
            yield line, _unknown(query, document, queries)
        else:
            yield line, {"query": queries[query], "positive": documents[document]}


def _unknown(query: str, document: str, queries: Iterable[str]) -> BadRow:
    if query not in queries:
        return BadRow(f"query {query!r} is not in queries.jsonl")
    return BadRow(f"document {document!r} is not in corpus.jsonl")


def _qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line, query, document, score in _judgements(path):
        if query not in queries or document not in documents:
            raise InputError(f"{path}:{line}: {_unknown(query, document, queries).what}. Add it, or remove the line.")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise InputError(f"{path}:{line}: query {query!r} and document {document!r} have two scores. Keep one.")
    return qrels


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Stream ``(line, query id, document id, score)`` below a header; scores may be graded or negative."""
    header_seen = False
    for line, text in lines(path):
        fields = text.rstrip("\r\n").split("\t")
        if not header_seen:
            header_seen = True
            if fields != _QRELS_HEADER:
                raise InputError(f"{path}:{line}: the header is {fields}. Write {_QRELS_HEADER}, separated by tabs.")
        elif text.strip():
            yield line, *_judgement(f"{path}:{line}", fields)


def _judgement(place: str, fields: list[str]) -> tuple[str, str, int]:
    if len(fields) != len(_QRELS_HEADER):
        raise InputError(
            f"{place}: {len(fields)} fields, not 3. Write query id, document id and score, separated by tabs."
        )
    try:
        return fields[0], fields[1], int(fields[2])
    except ValueError:
        raise InputError(f"{place}: the score {fields[2]!r} is not an integer. Write 0, 1, 2, ...") from None


def _beir_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name}.jsonl or {name}.jsonl.gz. A BEIR folder needs one of them.")


def _splits(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
