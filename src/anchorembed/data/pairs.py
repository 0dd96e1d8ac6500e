"""Rows to pairs of texts, validated and streamed; every fault names its file and line. Files are read by `formats`.

A row with several positives is as many pairs, each with all negatives of the row.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from anchorembed.data.beir import beir_folders_in, judged_pair_rows, splits
from anchorembed.data.documents import ID_NAMES
from anchorembed.data.formats import FORMATS, dataset_rows, existing, split_of_pairs, table_rows
from anchorembed.data.hub import HubDataset, files_of_split, hub_rows, located, pinned
from anchorembed.data.rows import (
    BadRow,
    Chooser,
    Row,
    Rows,
    checked,
    json_list,
    listed_names,
    missing,
    not_empty,
    required_text,
)
from anchorembed.errors import InputError
from anchorembed.system.files import hash_content

QUERY_NAMES = ("query", "anchor")
POSITIVE_NAMES = ("positive", "document", "positives", "pos")
NEGATIVE_NAMES = ("negative", "negatives", "neg")
LABEL_NAMES = ("label", "score")
SCORES_NAME = "scores"
SIDE_SCORES_NAMES = ("pos_scores", "neg_scores")  # FlagEmbedding's
_LISTS_OF_POSITIVES = ("positives", "pos")  # whose texts may be JSON
_OTHER_NAMES = {  # of such columns in other data sets, in lower case, the likeliest first
    "query": ("query", "anchor", "question", "prompt", "instruction", "input", "text1", "sentence1", "title", "source"),
    "positive": (
        *("positive", "document", "answer", "response", "completion", "output", "body", "passage", "context", "text2"),
        *("sentence2", "target", "content", "text"),
    ),
}
_LARGEST_SCORE = 1e6
_SHOWN_CHARACTERS = 40  # of a value
_NUMBERED_NEGATIVE = re.compile(r"negative_(\d{1,9})", re.ASCII)  # sentence-transformers' n-tuples
_NULLABLE_NAMES = frozenset((*NEGATIVE_NAMES, *LABEL_NAMES))
_KNOWN_NAMES = _NULLABLE_NAMES | {*QUERY_NAMES, *POSITIVE_NAMES, SCORES_NAME, *SIDE_SCORES_NAMES}


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
    path: str | Path,
    *,
    source: str = "",
    on_skip: Callable[[str], None] | None = None,
    on_unused: Callable[[str], None] | None = None,
) -> Iterator[TextPair]:
    """Stream the pairs of a file, folder or data set on the hub in any of `FORMATS`.

    Args:
        path: of the file or folder, or ``hf://owner/name[:config][@split][#revision]``.
        source: name of the source, kept in each pair.
        on_skip: gets a message for each bad row, which is then dropped: ``path:line: what is wrong``.
        on_unused: gets the names of columns that are not used, after the last row; without it they are logged.

    Raises:
        InputError: on a bad row, without ``on_skip``; if a column is missing or the file damaged; if no pair is usable.
    """
    columns: dict[str, None] = {}
    location, files = _files_of_pairs(located(path), columns)
    first_fault: list[str] = []

    def skip(fault: str) -> None:
        first_fault[:] = first_fault or [fault]
        if on_skip:
            on_skip(fault)

    def no_pair() -> str:
        message = f"{location}: no usable pair. Give at least one query with its positive."
        known_columns = f" Columns there: {listed_names(columns)}." if columns and first_fault else ""
        return " ".join([message + known_columns, *(first_fault if known_columns else ())])

    pairs = checked(
        location,
        files,
        lambda line, row: _pairs(row, source, line),
        lambda names: filter(_is_known, names),
        cure="Remove the line, or drop and count such lines by data.skip_bad or --skip-bad.",
        seen=columns,
        on_bad=on_skip and skip,
        on_unused=on_unused,
    )
    return not_empty(chain.from_iterable(pairs), no_pair)


def content_of(path: str | Path) -> str:
    """The identity of the pairs that `read_pairs` reads: a content hash, or an address on the hub with its commit.

    Raises:
        InputError: if there is no such file, folder or data set.
    """
    location = located(path)
    return str(pinned(location)) if isinstance(location, HubDataset) else hash_content(location)


def folded(text: str) -> str:
    """A text without differences of letter case and white space, to compare texts by."""
    return " ".join(text.casefold().split())


# --- Rows to records -------------------------------------------------------------------------------------------------


def _pairs(row: Row, source: str, line: int) -> list[TextPair]:
    query, positive, negative_columns = _columns(list(row))
    positives = _positives(row[positive], positive)
    negatives = tuple(text for key in negative_columns for text in _negatives(row[key], key))
    scores = _scores(row, len(positives), len(negatives))
    for key in LABEL_NAMES:
        _check_label(row.get(key), key)
    query_text = required_text(row, query)
    return [
        TextPair(query_text, text, negatives, source, line, scores and (scores[number], *scores[len(positives) :]))
        for number, text in enumerate(positives)
    ]


def _columns(columns: list[str]) -> tuple[str, str, list[str]]:
    """Names of a row's query column, positive column, and columns of negatives, in order."""
    query, positive, negative = (_present(names, columns) for names in (QUERY_NAMES, POSITIVE_NAMES, NEGATIVE_NAMES))
    if query is None or positive is None:
        lacking = [QUERY_NAMES] * (query is None) + [POSITIVE_NAMES[:2]] * (positive is None)
        raise missing(lacking, columns, _renaming([names[0] for names in lacking], columns))
    numbered = sorted(filter(_NUMBERED_NEGATIVE.fullmatch, columns), key=lambda name: int(name.partition("_")[2]))
    if negative is None:
        return query, positive, numbered
    return query, positive, [str(_present((negative, *numbered), columns))]


def _renaming(sides: list[str], columns: list[str]) -> str:
    """The cure of missing columns: rename those of `_OTHER_NAMES`, or the only two. Empty if one is not found."""
    lower = {name.lower(): name for name in columns}
    named = [next((lower[name] for name in _OTHER_NAMES[side] if name in lower), "") for side in sides]
    if len(sides) == len(columns) == 2 and not any(named):
        named = [name for name in columns if name.isidentifier() and name not in ID_NAMES]  # no sentence, no id
    renamed = [f'"{name}" to "{side}"' for name, side in zip(named, sides, strict=False) if name]
    return f" Rename {' and '.join(renamed)}." if len(renamed) == len(sides) else ""


def _is_known(name: str) -> bool:
    return name in _KNOWN_NAMES or _NUMBERED_NEGATIVE.fullmatch(name) is not None


def _is_nullable(name: str) -> bool:
    return name in _NULLABLE_NAMES or _NUMBERED_NEGATIVE.fullmatch(name) is not None


def _present(names: Sequence[str], columns: Iterable[str]) -> str | None:
    """Which of the names is a column, or None; raises BadRow if two are."""
    given = [name for name in names if name in columns]
    if len(given) > 1:
        raise BadRow(f'both "{given[0]}" and "{given[1]}" are given', " Keep one of them.")
    return given[0] if given else None


def _positives(value: object, key: str) -> list[str]:
    """The positives of a cell: a text or a list, in CSV as JSON in the columns of `_LISTS_OF_POSITIVES`."""
    listed = json_list(value, key) if key in _LISTS_OF_POSITIVES else value
    if listed == []:
        raise BadRow(f'"{key}" is empty')
    return [required_text({key: text}, key) for text in (listed if isinstance(listed, list) else [value])]


def _negatives(value: object, key: str) -> tuple[str, ...]:
    """The negatives of a cell, given as a text or a list, which in CSV is JSON.

    Null or an empty list means no negatives; an empty text is a fault.
    """
    if value is None:
        return ()
    listed = json_list(value, key)
    return tuple(required_text({key: text}, key) for text in (listed if isinstance(listed, list) else [value]))


def _check_label(value: object, key: str) -> None:
    """Refuse a pair whose label is not 1, true or missing; a list is of scores, not a label."""
    if value is None or isinstance(json_list(value, key), list):
        return
    try:
        is_positive = isinstance(value, int | float | str) and (str(value).lower() == "true" or float(value) == 1)
    except (ValueError, OverflowError):
        is_positive = False
    if not is_positive:
        shown = repr(value)[:_SHOWN_CHARACTERS]
        cure = f' Keep the rows of label 1 alone, or remove the column "{key}" if all pairs are positives.'
        raise BadRow(f'"{key}" is {shown}, not 1: the pair is no positive', cure)


def _scores(row: Row, positives: int, negatives: int) -> tuple[float, ...]:
    """Scores of a row's positives and then of its negatives, from a column of scores, or of labels that are lists.

    Empty if there is none, or its cell is null or empty.
    """
    labels = [key for key in LABEL_NAMES if isinstance(json_list(row.get(key), key), list)]
    given = [key for key in (SCORES_NAME, *labels, *SIDE_SCORES_NAMES) if json_list(row.get(key), key) is not None]
    if given in ([SIDE_SCORES_NAMES[0]], [SIDE_SCORES_NAMES[1]]) and positives and negatives:
        raise BadRow(f'"{given[0]}" is given without "{next(n for n in SIDE_SCORES_NAMES if n not in given)}"')
    if given[1:] and tuple(given) != SIDE_SCORES_NAMES:
        _present(given, given)
    counts = dict(zip(SIDE_SCORES_NAMES, (positives, negatives), strict=True))
    sides = [_numbers(row[key], key, counts.get(key, positives + negatives)) for key in given]
    return tuple(chain.from_iterable(sides))


def _numbers(value: object, key: str, texts: int) -> list[float]:
    listed = json_list(value, key)
    if not isinstance(listed, list) or len(listed) != texts:
        whose = {"pos_scores": "positive", "neg_scores": "negative"}.get(key, "positive and for each negative")
        raise BadRow(f'"{key}" must be a list: a number for the {whose}, {texts} here')
    if not all(type(score) in (int, float) and abs(score) <= _LARGEST_SCORE for score in listed):
        raise BadRow(f'"{key}" must hold numbers between -{_LARGEST_SCORE:g} and {_LARGEST_SCORE:g}')
    return list(map(float, listed))


# --- Files to rows ---------------------------------------------------------------------------------------------------


def _files_of_pairs(
    path: HubDataset | Path, columns: dict[str, None]
) -> tuple[HubDataset | Path, Iterable[tuple[object, Rows]]]:
    """Choose the reader by suffix or by a folder's files; returns what messages name, and each file with its rows."""

    def choose(names: list[str]) -> list[str]:
        columns.update(dict.fromkeys(names))
        _columns(names)
        return list(filter(_is_known, names))

    if isinstance(path, HubDataset):
        return path, [(path, hub_rows(path, choose))]
    if existing(path).is_dir():
        return _files_in_folder(path, choose)
    return path, [(path, table_rows(path, choose, FORMATS, _is_nullable))]


def _files_in_folder(folder: Path, choose: Chooser) -> tuple[Path, Iterable[tuple[object, Rows]]]:
    if (folder / "qrels").is_dir():
        qrels = folder / "qrels" / f"{split_of_pairs(f'{folder}/qrels', splits(folder))}.tsv"
        return qrels, [(qrels, judged_pair_rows(folder, qrels))]
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return folder, [(folder, dataset_rows(folder, choose))]
    if inner := beir_folders_in(folder):
        raise InputError(f"{folder}: not one source of pairs. {inner}")
    files = files_of_split(folder)
    if not files:
        raise InputError(f"{folder}: a folder of unknown format. Give {FORMATS}.")
    return folder, [(file, table_rows(file, choose, FORMATS, _is_nullable)) for file in files]
