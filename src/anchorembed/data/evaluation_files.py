"""Tests other than retrieval, from JSONL, CSV, TSV or Parquet files (each text format also gzipped), read whole.

The columns of a file decide its kind: ``query, positive, negative`` with lists to rerank; ``sentence1, sentence2`` with
a ``score`` (similarity) or a ``label`` of 0 or 1 (a pair to classify); ``text`` with a ``label`` or ``category``. Lists
in CSV are JSON. Quotes in TSV have no meaning, as in published test sets.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anchorembed.data.beir import beir_folders_in
from anchorembed.data.formats import TABLES, suffix_of, table_rows
from anchorembed.data.rows import BadRow, Row, checked, json_list, not_empty, required_text
from anchorembed.errors import InputError

_log = logging.getLogger(__name__)
_LABELS = ("label", "category")


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query with texts to rank, the positives before the negatives."""

    id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SentencePair:
    """Two texts and how alike they are: ``value`` is graded, or 0 or 1 for a pair to classify."""

    first: str
    second: str
    value: float


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str


TestRow = Candidates | SentencePair | LabelledText


@dataclass(frozen=True, slots=True)
class TestSet:
    """The rows of a test file; ``kind`` is the type of task, by mteb's name."""

    name: str
    kind: str
    rows: tuple[TestRow, ...]


def read_test_set(path: Path) -> TestSet:
    """Read a test file; its columns say what kind it is.

    Raises:
        InputError: on an unknown format, unknown columns or any bad row, with its line.
    """
    kind = ""
    used: set[str] = set()

    def make(line: int, row: Row) -> TestRow:
        nonlocal kind
        kind_of_row, columns, read = _kind(list(row))
        if kind and kind_of_row != kind:
            raise BadRow(f"its columns are those of {kind_of_row}, the first row's those of {kind}")
        kind = kind_of_row
        used.update(columns)
        return read(line, row)

    rows = table_rows(path, _columns, ".jsonl, .csv, .tsv (each also with .gz) or .parquet")
    records = tuple(
        not_empty(
            checked(path, [(path, rows)], make, lambda _: used, cure="Correct or remove the line."),
            lambda: f"{path}: no row. Give at least one line.",
        )
    )
    ids = {record.id for record in records if isinstance(record, Candidates)}
    if ids and len(ids) < len(records):
        raise InputError(f"{path}: {len(records)} queries share {len(ids)} ids. Give each its own query_id.")
    return TestSet(stem(path), kind, records)


def find_test_sets(path: Path) -> list[Path]:
    """The path itself if it is a file or a BEIR folder, else the test files in it; a warning names BEIR folders in it.

    Raises:
        InputError: if there are none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Name a BEIR folder, a test file or a folder of them.")
    if path.is_file() or (path / "qrels").is_dir():
        return [path]
    files = [
        file for file in sorted(path.iterdir()) if suffix_of(file) in TABLES and file.is_file() and file.name[0] != "."
    ]
    inner = beir_folders_in(path)
    if not files:
        fault = "neither a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) nor test files in it"
        raise InputError(f"{path}: {fault}. {inner}".rstrip())
    if inner:
        _log.warning("%s: only its files are read. %s", path, inner)
    return files


def stem(path: Path) -> str:
    """A file's name without its suffixes."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).stem


def _columns(names: list[str]) -> list[str]:
    """Check the names in a header; all columns are read."""
    _kind(names)
    return names


def _kind(names: list[str]) -> tuple[str, set[str], Callable[[int, Row], TestRow]]:
    """The kind of test that rows with these columns are for, the columns it uses, and the function that reads a row."""
    columns = set(names)
    if (needed := {"query", "positive", "negative"}) <= columns:
        return "Reranking", needed | {"query_id"}, _candidates
    if (needed := {"sentence1", "sentence2", "score"}) <= columns:
        return "STS", needed, lambda line, row: _pair(row, "score")
    if (needed := {"sentence1", "sentence2", "label"}) <= columns:
        return "PairClassification", needed, lambda line, row: _pair(row, "label")
    if "text" in columns and (label := next((name for name in _LABELS if name in columns), "")):
        return "Classification", {"text", label}, lambda line, row: _labelled(row, label)
    raise BadRow(
        f"its columns are {', '.join(names) or 'none'}",
        " Give query, positive and negative; sentence1, sentence2 and score or label; or text and label.",
    )


def _candidates(line: int, row: Row) -> Candidates:
    name = row.get("query_id")
    return Candidates(
        str(line if name in (None, "") else name),
        required_text(row, "query"),
        _texts(row, "positive"),
        _texts(row, "negative"),
    )


def _texts(row: Row, key: str) -> tuple[str, ...]:
    value = json_list(row[key], key)
    if not isinstance(value, list) or not value:
        raise BadRow(f'"{key}" is {"an empty list" if value == [] else "no list"}')
    return tuple(required_text({key: item}, key) for item in value)


def _pair(row: Row, key: str) -> SentencePair:
    value = row[key]
    try:
        number = float(value) if isinstance(value, int | float | str) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not math.isfinite(number):
        raise BadRow(f'"{key}" is {value!r}, not a number')
    if key == "label" and number not in (0.0, 1.0):
        raise BadRow(f'"label" is {value!r}, neither 0 nor 1')
    return SentencePair(required_text(row, "sentence1"), required_text(row, "sentence2"), number)


def _labelled(row: Row, key: str) -> LabelledText:
    value = row[key]
    return LabelledText(
        required_text(row, "text"), str(value) if isinstance(value, int) else required_text(row, key).strip()
    )
