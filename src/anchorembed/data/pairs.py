"""Pairs of texts from a file of any format, validated and streamed; every fault names its file and line."""

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
    """A query, the text that answers it, and hard negatives; ``line`` is its line or row in its file, from 1.

    ``scores`` are another model's, of the positive and then of each negative, or empty.
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

    Args:
        path: of the file or folder.
        source: name of the source, for the pairs to keep.
        skip_bad: drop bad rows rather than raise.
        on_skip: gets a message for each row dropped: ``path:line: what is wrong``.

    Raises:
        InputError: on a bad row, unless ``skip_bad``; if a column is missing or the file damaged; if no pair is usable.
    """
    numbered_file, rows = _pair_rows(path)
    pairs = checked(
        numbered_file,
        rows,
        lambda line, row: _pair(row, source, line),
        cure="Remove the line, or drop and count such lines by data.skip_bad or --skip-bad.",
        on_bad=(on_skip or (lambda _message: None)) if skip_bad else None,
    )
    return not_empty(pairs, f"{numbered_file}: no usable pair. Give at least one query with its positive.")


def folded(text: str) -> str:
    """A text without differences of letter case and white space, to compare texts by."""
    return " ".join(text.casefold().split())


# --- Rows to records -------------------------------------------------------------------------------------------------


def _pair(row: Row, source: str, line: int) -> TextPair:
    query, positive, negative = _columns(list(row))
    negatives = _negatives(row, negative)
    scores = _scores(row.get(SCORES_NAME), 1 + len(negatives))
    return TextPair(required_text(row, query), required_text(row, positive), negatives, source, line, scores)


def _columns(columns: list[str]) -> tuple[str, str, str | None]:
    """Names of the query, positive and (optional) negative column among those of a row."""
    query, positive, negative = (_one_of(names, columns) for names in (QUERY_NAMES, POSITIVE_NAMES, NEGATIVE_NAMES))
    if query is None or positive is None:
        raise missing(QUERY_NAMES if query is None else POSITIVE_NAMES, columns)
    return query, positive, negative


def _one_of(names: tuple[str, str], columns: Iterable[str]) -> str | None:
    given = [name for name in names if name in columns]
    if len(given) > 1:
        raise BadRow(f'both "{names[0]}" and "{names[1]}" are given', " Keep one of them.")
    return given[0] if given else None


def _negatives(row: Row, key: str | None) -> tuple[str, ...]:
    """The negatives of a row, given as a text or a list, which in CSV is JSON.

    An absent column, null or an empty list means no negatives; an empty text is a fault.
    """
    value = None if key is None else row[key]
    if key is None or value is None:
        return ()
    listed = json_list(value) if isinstance(value, str) else value
    if isinstance(listed, list):
        return tuple(required_text({key: item}, key) for item in listed)
    return (required_text(row, key),)


def _scores(value: object, texts: int) -> tuple[float, ...]:
    """The given scores of a row, of the positive and of each negative: a list, which in CSV is JSON.

    An absent column, null or an empty cell means no scores.
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


# --- Files to rows ---------------------------------------------------------------------------------------------------


def _pair_rows(path: Path) -> tuple[Path, Rows]:
    """Choose the reader by suffix or by what a folder holds; returns the file whose lines are numbered, and rows."""
    if existing(path).is_dir():
        return _folder_rows(path)
    rows = table_rows(path, _pair_columns, NEGATIVE_NAMES)
    if rows is None:
        raise InputError(f"{path}: unknown format. Give {FORMATS}.")
    return path, rows


def _pair_columns(names: list[str]) -> list[str]:
    """Check the names in a header and return those of the columns to read."""
    _columns(names)
    return [name for name in names if name in _KNOWN_NAMES]


def _folder_rows(folder: Path) -> tuple[Path, Rows]:
    if (folder / "qrels").is_dir():
        qrels = folder / "qrels" / f"{split_of_pairs(f'{folder}/qrels', splits(folder))}.tsv"
        return qrels, judged_pair_rows(folder, qrels)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return folder, dataset_rows(folder, _pair_columns)
    raise InputError(f"{folder}: a folder of unknown format. Give {FORMATS}.")
