"""Numbered rows of a file to records: ``(line, mapping)``, or ``(line, BadRow)`` where a row cannot be read.

`checked` turns rows into records. It stops at the first bad row, or drops bad rows and reports each. `formats` reads
the rows.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from anchorembed.errors import InputError, nearest

_log = logging.getLogger(__name__)

SAVE_AS_UTF8 = " Save the file as UTF-8, such as by: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
_MOST_NAMES, _NAME_CHARACTERS = 10, 40  # of columns in a message
_PYTHON_LIST = re.compile(r"""\s*\[\s*['"].*['"]\s*,?\s*\]\s*""", re.DOTALL)
_KINDS = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


class BadRow(Exception):
    """Why a row cannot be used. Checks raise it; readers yield it instead of the row and go on reading.

    The message is ``fault``, ``hint``, and ``cure`` or else the cure that `checked` has for all rows.
    """

    def __init__(self, fault: str, hint: str = "", cure: str = "") -> None:
        super().__init__(fault)
        self.fault, self.hint, self.cure = fault, hint, cure


Row = Mapping[str, object]
Rows = Iterator[tuple[int, Row | BadRow]]
Chooser = Callable[[list[str]], list[str]]  # of columns: names in a header -> those to read, or raises BadRow
_T = TypeVar("_T")


def listed_names(names: Iterable[str]) -> str:
    """The names of columns as a message lists them: cut, and the first ten."""
    every = list(names)
    shown = ", ".join(repr(name[:_NAME_CHARACTERS]) for name in every[:_MOST_NAMES])
    return shown + (f" and {len(every) - _MOST_NAMES} more" if every[_MOST_NAMES:] else "")


def checked(
    path: object,
    files: Iterable[tuple[object, Rows]],
    make: Callable[[int, Row], _T],
    used: Callable[[Collection[str]], Iterable[str]],
    *,
    cure: str,
    seen: dict[str, None] | None = None,
    on_bad: Callable[[str], None] | None = None,
    on_unused: Callable[[str], None] | None = None,
) -> Iterator[_T]:
    """Turn the rows of files into records; the message of a bad row, with its file and line, goes to ``on_bad``.

    ``seen`` gets the names of all columns, of which ``used`` returns those that records use. The other names go to
    ``on_unused`` after the last row read; without it they are logged, as those of ``path``.

    Raises:
        InputError: at the first bad row, with its cure, if there is no ``on_bad``.
    """
    seen = {} if seen is None else seen
    with suppress(GeneratorExit):  # the caller may stop early
        for file, line, row in ((file, line, row) for file, rows in files for line, row in rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                seen |= dict.fromkeys(row)
                record = make(line, row)
            except BadRow as bad:
                if on_bad is None:
                    raise InputError(f"{file}:{line}: {bad.fault}.{bad.hint}{bad.cure or f' {cure}'}") from None
                on_bad(f"{file}:{line}: {bad.fault}.{bad.hint}{bad.cure}")
            else:
                yield record
    used_names = set(used(seen))
    if unused := listed_names(name for name in seen if name not in used_names):
        (on_unused or partial(_log.info, "%s: columns that are not used: %s", path))(unused)


def not_empty(records: Iterator[_T], message: Callable[[], str]) -> Iterator[_T]:
    """Pass records on; raise InputError with the message if there are none."""
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise InputError(message())


# --- Cells -----------------------------------------------------------------------------------------------------------


def required_text(row: Row, key: str) -> str:
    """The text of a cell that must hold more than space; raises BadRow."""
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(f'"{key}" is {kind_of(value)}, not text')
    if not value.strip():
        raise BadRow(f'"{key}" is empty')
    return _encodable(value, key)


def optional_text(row: Row, key: str) -> str:
    """The text of a cell, empty where the cell is absent or null; raises BadRow."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f'"{key}" is {kind_of(value)}, not text')
    return _encodable(value or "", key)


def _encodable(value: str, key: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fault = f'"{key}" is not valid UTF-8 at character {error.start + 1}'
        byte = ord(value[error.start]) - 0xDC00  # `lines` reads a byte that is not UTF-8 as 0xDC00 + byte
        if 0x80 <= byte <= 0xFF:
            raise BadRow(f"{fault} (byte 0x{byte:X})", SAVE_AS_UTF8) from None
        raise BadRow(f"{fault} (a lone surrogate)") from None
    return value


def missing(wanted: Sequence[tuple[str, ...]], columns: list[str], cure: str = "") -> BadRow:
    """The fault of a row that lacks columns; for each of them ``wanted`` has the names that are accepted."""
    lacking = " and no ".join(" or ".join(f'"{name}"' for name in names) for names in wanted)
    hints = (next(filter(None, (nearest(name, names) for name in columns)), "") for names in wanted)
    return BadRow(f"no {lacking} here, only {listed_names(columns) or 'nothing'}", "" if cure else "".join(hints), cure)


def kind_of(value: object) -> str:
    """The type of a JSON value, in words for a message."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def json_list(cell: object, key: str) -> object:
    """The value of a cell that may hold a list: a text, such as CSV has, is read as JSON.

    An empty text is None, and a text that is not JSON stays as it is.

    Raises:
        BadRow: if it is a list as Python prints it.
    """
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        if _PYTHON_LIST.fullmatch(cell):
            raise BadRow(f'"{key}" is a list as Python prints it', ' Write it as JSON: ["a", "b"].') from None
        return cell
