"""Tests other than retrieval, from JSONL, CSV, TSV or Parquet files (each text format also gzipped), read whole.

What a file is follows from its columns: ``query, positive, negative`` lists to rerank; ``sentence1, sentence2`` with a
``score`` (similarity) or a ``label`` of 0 or 1 (a pair to classify); ``text`` with a ``label`` or ``category``.
In a cell of CSV a list stands as JSON; quotes in a TSV are text, as in the sets that are handed around in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anchorembed.data.rows import BadRow, Row, checked, json_list, not_empty, required_text, table_rows
from anchorembed.errors import InputError

_CURE = "Correct or remove the line."
_LABELS = ("label", "category")
_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query with texts to rank: each positive before each negative is perfect."""

    id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SentencePair:
    """Two texts, and how alike they are: a graded ``value``, or 0 or 1 for a pair to classify."""

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
    """A test file: ``kind`` is mteb's name for what its rows ask."""

    name: str
    kind: str
    rows: tuple[TestRow, ...]


def read_test_set(path: Path) -> TestSet:
    """Read a test file; its columns say what kind it is.

    Raises:
        InputError: on an unknown format, unknown columns or any bad row, with its line.
    """
    found: list[str] = []

    def make(line: int, row: Row) -> TestRow:
        kind, read = _kind(list(row))
        if found and kind != found[0]:
            raise BadRow(f"its columns are those of {kind}, the first row's those of {found[0]}")
        found[:] = [kind]
        return read(line, row)

    rows = table_rows(path, _columns)
    if rows is None:
        raise InputError(f"{path}: unknown format. Give .jsonl, .csv, .tsv (each also with .gz) or .parquet.")
    read = tuple(not_empty(checked(path, rows, make, cure=_CURE), f"{path}: no row. Give at least one line."))
    ids = {row.id for row in read if isinstance(row, Candidates)}
    if ids and len(ids) < len(read):
        raise InputError(f"{path}: {len(read)} queries share {len(ids)} ids. Give each its own query_id.")
    return TestSet(stem(path), found[0], read)


def test_files(path: Path) -> list[Path]:
    """A BEIR folder or a file alone, or the test files in a folder.

    Raises:
        InputError: if there are none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Name a BEIR folder, a test file or a folder of them.")
    if path.is_file() or (path / "qrels").is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.name.removesuffix(".gz").endswith(_SUFFIXES)]
    if not files:
        raise InputError(f"{path}: neither a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) nor test files in it.")
    return files


def stem(path: Path) -> str:
    """A file's name without its suffix, and without that of compression."""
    return Path(path.name.removesuffix(".gz")).stem


def _columns(names: list[str]) -> list[str]:
    _kind(names)
    return names


def _kind(names: list[str]) -> tuple[str, Callable[[int, Row], TestRow]]:
    have = set(names)
    if {"query", "positive", "negative"} <= have:
        return "Reranking", _candidates
    if {"sentence1", "sentence2", "score"} <= have:
        return "STS", lambda line, row: _pair(row, "score")
    if {"sentence1", "sentence2", "label"} <= have:
        return "PairClassification", lambda line, row: _pair(row, "label")
    if "text" in have and have & set(_LABELS):
        return "Classification", _labelled
    raise BadRow(
        f"its columns are {', '.join(names) or 'none'}",
        " Give query, positive and negative; sentence1, sentence2 and score or label; or text and label.",
    )


def _candidates(line: int, row: Row) -> Candidates:
    name = row.get("query_id", line)
    return Candidates(str(name), required_text(row, "query"), _texts(row, "positive"), _texts(row, "negative"))


def _texts(row: Row, key: str) -> tuple[str, ...]:
    value = json_list(cell) if isinstance(cell := row[key], str) else cell
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


def _labelled(line: int, row: Row) -> LabelledText:
    key = next(name for name in _LABELS if name in row)
    value = row[key]
    return LabelledText(
        required_text(row, "text"), str(value) if isinstance(value, int) else required_text(row, key).strip()
    )
