"""Text from disk, validated and streamed: one pass, one record at a time, every fault with its file and line.

Rows of any format (`rows`) become pairs, texts and retrieval tests here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorembed.data.beir import judged_pair_rows, splits
from anchorembed.data.rows import (
    BadRow,
    Row,
    Rows,
    checked,
    dataset_rows,
    existing,
    json_list,
    missing,
    not_empty,
    required_text,
    split_of_pairs,
    table_rows,
)
from anchorembed.errors import InputError

QUERY_NAMES = ("query", "anchor")
POSITIVE_NAMES = ("positive", "document")
NEGATIVE_NAMES = ("negative", "negatives")
SCORES_NAME = "scores"
FORMATS = (
    ".jsonl, .csv, .tsv (each also with .gz), .parquet, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) "
    "or a folder written by datasets' save_to_disk"
)
_LARGEST_SCORE = 1e6
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
        qrels = folder / "qrels" / f"{split_of_pairs(f'{folder}/qrels', splits(folder))}.tsv"
        return qrels, judged_pair_rows(folder, qrels)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return folder, dataset_rows(folder, _pair_columns)
    raise InputError(f"{folder}: a folder of unknown format. Give {FORMATS}.")
