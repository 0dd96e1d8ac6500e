"""Text from disk, validated and streamed: one pass, one record at a time, every fault with its file and line.

Every format comes down to numbered rows, ``(line, mapping)`` or ``(line, fault)``. What a row must hold is checked in
one place, `_checked`, which either stops at the first bad row or drops it and says so.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar

import pyarrow
import pyarrow.parquet

from anchorembed.errors import InputError, nearest

QUERY_NAMES = ("query", "anchor")
POSITIVE_NAMES = ("positive", "document")
NEGATIVE_NAMES = ("negative", "negatives")
FORMATS = (
    ".jsonl, .csv, .tsv (each also with .gz), .parquet, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) "
    "or a folder written by datasets' save_to_disk"
)
_LARGEST_CELL = 1 << 24  # characters; bounds what an unclosed quote can swallow
_QRELS_HEADER = ["query-id", "corpus-id", "score"]
_KNOWN_NAMES = frozenset(QUERY_NAMES + POSITIVE_NAMES + NEGATIVE_NAMES)
_KINDS = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query and the text that answers it; ``line`` is its 1-based line or row in its file."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    source: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id; a title, where there is one, is the text's first line."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Collection:
    """A retrieval test: what is searched, what is asked, and ``qrels[query id][document id]`` = graded relevance."""

    name: str
    documents: tuple[Document, ...]
    queries: tuple[Document, ...]
    qrels: dict[str, dict[str, int]]


class _BadRow(Exception):
    """A row that cannot be used, and why; checks raise it, readers hand it on as a value and go on reading."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


_Row = Mapping[str, object]
_Rows = Iterator[tuple[int, _Row | _BadRow]]
_T = TypeVar("_T")


def read_pairs(
    path: Path, *, source: str = "", skip_bad: bool = False, on_skip: Callable[[str], None] | None = None
) -> Iterator[TextPair]:
    """Stream the pairs of a file or folder in any of `FORMATS`.

    A bad row raises InputError; with ``skip_bad`` it is dropped and ``on_skip`` gets a message that names its place.
    A missing column, a damaged file and a file without one usable pair raise InputError either way.
    """
    place, rows = _pair_rows(path)
    pairs = _checked(
        place,
        rows,
        lambda line, row: _pair(row, source, line),
        cure="Remove the line, or pass --skip-bad to drop and count such lines.",
        on_bad=(on_skip or (lambda _message: None)) if skip_bad else None,
    )
    return _not_empty(pairs, f"{place}: no usable pair. Give at least one query with its positive.")


def read_corpus(path: Path) -> Iterator[Document]:
    """Stream a BEIR corpus (JSONL of ``_id``, ``title``, ``text``); any fault or repeated id raises InputError."""
    return _not_empty(_documents(_existing(path), needs_id=True), f"{path}: no document. Give at least one line.")


def read_texts(path: Path) -> Iterator[Document]:
    """Stream texts to encode: corpus lines, lines with only ``text``, or a ``.txt`` with one text a line.

    A text without an id is called by its 1-based line number. Any fault or repeated id raises InputError.
    """
    suffix = _suffix(_existing(path))
    if suffix == ".txt":
        texts = _plain_texts(path)
    elif suffix == ".jsonl":
        texts = _documents(path, needs_id=False)
    else:
        raise InputError(f"{path}: texts cannot be read from this. Give .jsonl or .txt (each also with .gz).")
    return _not_empty(texts, f"{path}: no text. Give at least one line.")


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Read a BEIR folder whole: ``corpus.jsonl``, ``queries.jsonl`` (each also .gz) and ``qrels/<split>.tsv``.

    Only queries with a judgement above 0 are kept. A judgement that names an unknown id raises InputError.
    """
    qrels_path = _existing(folder) / "qrels" / f"{split}.tsv"
    if not qrels_path.is_file():
        raise InputError(f"{qrels_path}: no such file. {_has('Splits there', _splits(folder))}")
    documents = tuple(read_corpus(_beir_file(folder, "corpus")))
    queries = tuple(read_corpus(_beir_file(folder, "queries")))
    qrels = _qrels(qrels_path, {query.id for query in queries}, {document.id for document in documents})
    kept = {query: scores for query, scores in qrels.items() if max(scores.values()) > 0}
    if not kept:
        raise InputError(f"{qrels_path}: no judgement above 0. Give at least one relevant document.")
    return Collection(folder.resolve().name, documents, tuple(query for query in queries if query.id in kept), kept)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line, gzipped if the name ends in .gz, whole or not at all; return the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        # A fixed time stamp and no file name in the gzip header: the same rows give the same bytes.
        with partial.open("wb") as raw:
            binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            with TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
                for row in rows:
                    stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                    count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


# Rows to records


def _checked(
    place: Path, rows: _Rows, make: Callable[[int, _Row], _T], *, cure: str, on_bad: Callable[[str], None] | None = None
) -> Iterator[_T]:
    """Turn rows into records; a bad row goes to ``on_bad``, or without one ends the reading with its cure."""
    for line, row in rows:
        try:
            if isinstance(row, _BadRow):
                raise row
            record = make(line, row)
        except _BadRow as bad:
            if on_bad is None:
                raise InputError(f"{place}:{line}: {bad.what}.{bad.hint} {cure}") from None
            on_bad(f"{place}:{line}: {bad.what}.{bad.hint}")
        else:
            yield record


def _not_empty(records: Iterator[_T], message: str) -> Iterator[_T]:
    """Pass records on; none at all is an InputError."""
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise InputError(message)


def _pair(row: _Row, source: str, line: int) -> TextPair:
    query, positive, negative = _columns(list(row))
    return TextPair(_text(row, query), _text(row, positive), _negatives(row, negative), source, line)


def _columns(found: list[str]) -> tuple[str, str, str | None]:
    """Name the query, positive and (optional) negative columns among those found."""
    query, positive, negative = (_one_of(names, found) for names in (QUERY_NAMES, POSITIVE_NAMES, NEGATIVE_NAMES))
    if query is None or positive is None:
        raise _missing(QUERY_NAMES if query is None else POSITIVE_NAMES, found)
    return query, positive, negative


def _one_of(names: tuple[str, str], found: Iterable[str]) -> str | None:
    here = [name for name in names if name in found]
    if len(here) > 1:
        raise _BadRow(f'both "{names[0]}" and "{names[1]}" are given', " Keep one of them.")
    return here[0] if here else None


def _missing(names: tuple[str, ...], found: list[str]) -> _BadRow:
    shown = ", ".join(repr(name[:40]) for name in found[:10]) or "nothing"
    wanted = " or ".join(f'"{name}"' for name in names)
    hint = next(filter(None, (nearest(name, names) for name in found)), "")
    return _BadRow(f"no {wanted} here, only {shown}", hint)


def _text(row: _Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise _BadRow(f'"{key}" is {_kind(value)}, not text')
    if not value.strip():
        raise _BadRow(f'"{key}" is empty')
    return _encodable(value, key)


def _encodable(value: str, key: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f'"{key}" is not valid UTF-8 at character {error.start + 1} (a lone surrogate)') from None
    return value


def _negatives(row: _Row, key: str | None) -> tuple[str, ...]:
    """Read the negatives of a row; an absent column, null or an empty list is none, an empty text is a fault."""
    value = None if key is None else row[key]
    if key is None or value is None:
        return ()
    if isinstance(value, list):
        return tuple(_text({key: item}, key) for item in value)
    return (_text(row, key),)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


# Documents


def _documents(path: Path, *, needs_id: bool) -> Iterator[Document]:
    seen: set[str] = set()

    def make(line: int, row: _Row) -> Document:
        document = Document(_id(row, None if needs_id else line), _titled_text(row))
        if document.id in seen:
            raise _BadRow(f"the id {document.id!r} is already taken by an earlier line")
        seen.add(document.id)
        return document

    return _checked(path, _json_rows(path), make, cure="Correct or remove the line.")


def _id(row: _Row, default: int | None) -> str:
    if "_id" not in row:
        if default is None:
            raise _missing(("_id",), list(row))
        return str(default)
    value = row["_id"]
    return str(value) if type(value) is int else _text(row, "_id")


def _titled_text(row: _Row) -> str:
    """Join title and text; both may be empty (BEIR corpora hold empty documents), but not both missing."""
    if "text" not in row and "title" not in row:
        raise _missing(("text", "title"), list(row))
    title, text = (_optional_text(row, key) for key in ("title", "text"))
    return f"{title}\n{text}" if title.strip() else text


def _optional_text(row: _Row, key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise _BadRow(f'"{key}" is {_kind(value)}, not text')
    return _encodable(value or "", key)


def _plain_texts(path: Path) -> Iterator[Document]:
    rows: _Rows = ((line, {"text": text.rstrip("\r\n")}) for line, text in _lines(path) if text.strip())
    return _checked(path, rows, lambda line, row: Document(str(line), _text(row, "text")), cure="Correct the line.")


# Files to rows


def _pair_rows(path: Path) -> tuple[Path, _Rows]:
    """Choose the reader by suffix or by what a folder holds; the place is the file that line numbers refer to."""
    suffix = _suffix(_existing(path))
    if path.is_dir():
        return _folder_rows(path)
    if suffix == ".jsonl":
        return path, _json_rows(path)
    if suffix in (".csv", ".tsv"):
        return path, _csv_rows(path, "," if suffix == ".csv" else "\t")
    if path.suffix.lower() == ".parquet":
        return path, _parquet_rows(path)
    raise InputError(f"{path}: unknown format. Give {FORMATS}.")


def _folder_rows(folder: Path) -> tuple[Path, _Rows]:
    if (folder / "qrels").is_dir():
        splits = _splits(folder)
        if "train" not in splits and len(splits) != 1:
            raise InputError(f"{folder}/qrels: no train.tsv. {_has('Keep only the split to read of', splits)}")
        qrels = folder / "qrels" / f"{'train' if 'train' in splits else splits[0]}.tsv"
        return qrels, _beir_rows(folder, qrels)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return folder, _dataset_rows(folder)
    raise InputError(f"{folder}: a folder of unknown format. Give {FORMATS}.")


def _existing(path: Path) -> Path:
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder.{nearest(path.name, siblings)} Check the path.")
    return path


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Stream the numbered lines of a text file, plain or gzipped; bytes that are not UTF-8 become lone surrogates."""
    line = 0
    try:
        with (
            gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as binary,
            # binary is a GzipFile or a BufferedReader; both are readable buffers
            TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream,
        ):
            for line, text in enumerate(stream, 1):
                yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip data is cut short or damaged ({error})"
        raise InputError(f"{path}:{line + 1}: {what}. Copy the file again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _json_rows(path: Path) -> _Rows:
    return ((line, _parse_json(text)) for line, text in _lines(path) if not text.isspace())


def _parse_json(text: str) -> _Row | _BadRow:
    try:
        text.encode("utf-8")
        value = json.loads(text.rstrip("\r\n"))
    except UnicodeEncodeError:
        return _BadRow("the line is not valid UTF-8")
    except json.JSONDecodeError as error:
        return _BadRow(f"the line is not valid JSON ({error.msg}, column {error.colno})")
    except (RecursionError, ValueError) as error:
        return _BadRow(f"the line's JSON is beyond what can be read ({error})")
    return value if isinstance(value, dict) else _BadRow(f"the line is {_kind(value)}, not a JSON object")


def _csv_rows(path: Path, delimiter: str) -> _Rows:
    """Read rows under a header; a row's line is where it begins, for a quoted cell may hold line breaks."""
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, _BadRow(f"the row is not valid CSV ({error})")
            continue
        if header is None:
            header = _checked_header(f"{path}:{line}", cells)
        elif cells:
            yield line, _cells(header, cells)


def _cells(header: list[str], cells: list[str]) -> _Row | _BadRow:
    """Name the cells of a row; CSV has no null, so an empty cell of a negative column is an absent negative."""
    if len(cells) != len(header):
        return _BadRow(f"the row has {len(cells)} cells, the header {len(header)}")
    if any("\0" in cell for cell in cells):
        return _BadRow("the row holds a NUL byte")
    return {
        name: None if name in NEGATIVE_NAMES and not cell else cell for name, cell in zip(header, cells, strict=True)
    }


def _checked_header(place: str, names: list[str]) -> list[str]:
    """Return the column names; a file whose columns cannot make a pair fails whole, whatever its rows hold."""
    try:
        _columns(names)
    except _BadRow as bad:
        raise InputError(f"{place}: {bad.what}.{bad.hint} Rename the columns.") from None
    if len(set(names)) < len(names):
        raise InputError(f"{place}: a column name occurs twice among {names}. Rename or remove one of them.")
    return names


def _parquet_rows(path: Path) -> _Rows:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in _checked_header(str(path), file.schema_arrow.names) if name in _KNOWN_NAMES]
            for row, value in _arrow_rows(file.iter_batches(batch_size=1024, columns=names, use_threads=False)):
                yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}:{row + 1}: not readable as Parquet ({error}). Write the file again.") from error


def _dataset_rows(folder: Path) -> _Rows:
    import datasets  # noqa: PLC0415 - takes over a second to load, which only folders of this kind are worth

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder}: not readable as a saved dataset ({error}). Save it again.") from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = sorted(loaded)
        if "train" not in splits and len(splits) != 1:
            raise InputError(f"{folder}: no split 'train'. {_has('Give the folder of one of', splits)}")
        loaded = loaded["train" if "train" in splits else splits[0]]
    names = [name for name in _checked_header(str(folder), loaded.column_names) if name in _KNOWN_NAMES]
    yield from _arrow_rows(loaded.select_columns(names).with_format("arrow").iter(batch_size=1024))


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> _Rows:
    row = 0
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for index in range(batch.num_rows):
            row += 1
            try:
                value: _Row | _BadRow = {name: column[index].as_py() for name, column in columns.items()}
            except UnicodeDecodeError:
                value = _BadRow("the row is not valid UTF-8")
            yield row, value


# BEIR folders


def _beir_rows(folder: Path, qrels: Path) -> _Rows:
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


def _unknown(query: str, document: str, queries: Iterable[str]) -> _BadRow:
    if query not in queries:
        return _BadRow(f"query {query!r} is not in queries.jsonl")
    return _BadRow(f"document {document!r} is not in corpus.jsonl")


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
    for line, text in _lines(path):
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


def _has(what: str, names: list[str]) -> str:
    return f"{what}: {', '.join(names) or 'none'}."
