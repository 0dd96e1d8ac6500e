"""Files of any format to numbered rows, streamed; `rows` says what a row is and makes records of them.

The caller's `Chooser` checks which columns a table has, and returns those to read.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from anchorembed.data.rows import SAVE_AS_UTF8, BadRow, Chooser, Row, Rows, kind_of
from anchorembed.errors import InputError, nearest, refuse_utf16

_LARGEST_CELL = 1 << 24  # characters; bounds what an unclosed quote can swallow
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh9": "bzip2", b"\xfd7zX": "xz", b"PK\3\4": "zip"}
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")  # suffixes of files of rows
FORMATS = (
    ".jsonl, .csv, .tsv (each also with .gz), .parquet, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), "
    "a folder written by datasets' save_to_disk, a folder of such files, or hf://owner/name[:config][@split]"
)
QUOTE_COMMAS = ' Put quotes around a cell that holds a comma ("one, two"), or remove the line.'


def listed(title: str, names: list[str]) -> str:
    """Names after a title, as a sentence such as ``Splits there: dev, test``."""
    return f"{title}: {', '.join(names) or 'none'}."


# --- Files -----------------------------------------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """Return the path if it exists; raise InputError, with the nearest name in its folder, if not."""
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder.{nearest(path.name, siblings)} Check the path.")
    return path


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case, without that of compression."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Stream the numbered lines of a text file, plain or gzipped; bytes that are not UTF-8 become lone surrogates."""
    line = 0
    try:
        with (
            # a GzipFile or a BufferedReader: both can peek
            gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as binary,
            TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream,
        ):
            start = binary.peek(4)[:4]
            refuse_utf16(path, start)
            _refuse_compressed(path, start)
            for line, text in enumerate(stream, 1):
                yield line, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fault = f"the gzip data is cut short or damaged ({error})"
        raise InputError(f"{path}:{line + 1}: {fault}. Copy the file again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _refuse_compressed(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes are not of text but of an archive or of compression, whatever its name says."""
    for mark, name in _COMPRESSED.items():
        if start.startswith(mark):
            cure = "Name it .gz" if name == "gzip" and path.suffix.lower() != ".gz" else "Unpack it"
            raise InputError(f"{path}: the file is compressed by {name}, not text. {cure}.")


def json_rows(path: Path) -> Rows:
    """Read one JSON object a line; blank lines are skipped."""
    return ((line, _parse_json(text)) for line, text in lines(path) if not text.isspace())


def _parse_json(text: str) -> Row | BadRow:
    try:
        text.encode("utf-8")
        value = json.loads(text.rstrip("\r\n"))
    except UnicodeEncodeError:
        return BadRow("the line is not valid UTF-8", SAVE_AS_UTF8)
    except json.JSONDecodeError as error:
        return BadRow(f"the line is not valid JSON ({error.msg}, column {error.colno})")
    except (RecursionError, ValueError) as error:
        return BadRow(f"the line's JSON is beyond what can be read ({error})")
    return value if isinstance(value, dict) else BadRow(f"the line is {kind_of(value)}, not a JSON object")


def csv_rows(path: Path, choose: Chooser, nullable: Callable[[str], bool]) -> Rows:
    """Read the rows of a CSV or TSV file under its header; a row's number is that of its first line.

    A quoted cell of CSV may hold line breaks; in TSV quotes have no meaning. An empty cell is null in a column whose
    name is ``nullable``. Where a quote is not closed, each line that belongs to the cell is a bad row.
    """
    csv.field_size_limit(_LARGEST_CELL)
    tabs = suffix_of(path) == ".tsv"
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    delimiter = "\t" if tabs else ","
    texts = (text for _, text in lines(path))
    head = list(islice(texts, 1))
    _refuse_other_separators(path, "".join(head), delimiter)
    reader = csv.reader(chain(head, texts), delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            swallowed = range(line, reader.line_num + 1)
            where = f"the row of lines {line} to {swallowed[-1]}" if swallowed[1:] else "the row"
            for number in swallowed:
                yield number, BadRow(f"{where} is not valid CSV ({error})")
            continue
        if header is None:
            checked_header(
                f"{path}:{line}", cells, choose, "Rename the columns, which the first line names, or add that line."
            )
            header = cells
        elif cells:
            yield line, _cells(header, cells, nullable, "" if tabs else QUOTE_COMMAS)


def _refuse_other_separators(path: Path, header: str, delimiter: str) -> None:
    """Refuse a file whose header is one cell that another separator would split."""
    expected = "tabs" if delimiter == "\t" else "commas"
    others = (
        (";", "semicolons", f"Save it with {expected} between cells."),
        ("\t", "tabs", "Name it .tsv."),
        (",", "commas", "Name it .csv."),
    )
    for separator, name, cure in others:
        if delimiter not in header and separator in header:
            raise InputError(f"{path}:1: the cells are separated by {name}, not {expected}. {cure}")


def _cells(header: list[str], cells: list[str], nullable: Callable[[str], bool], cure_if_longer: str) -> Row | BadRow:
    if len(cells) != len(header):
        cure = cure_if_longer if len(cells) > len(header) else ""
        return BadRow(f"the row has {len(cells)} cells, the header {len(header)}", cure=cure)
    if any("\0" in cell for cell in cells):
        return BadRow("the row holds a NUL byte")
    return {name: None if not cell and nullable(name) else cell for name, cell in zip(header, cells, strict=True)}


def checked_header(location: str, names: list[str], choose: Chooser, cure: str = "Rename the columns.") -> list[str]:
    """Return the columns to read; raise InputError if a header lacks a needed column, or has a name twice."""
    try:
        wanted = choose(names)
    except BadRow as bad:
        raise InputError(f"{location}: {bad.fault}.{bad.hint}{bad.cure or f' {cure}'}") from None
    if len(set(names)) < len(names):
        raise InputError(f"{location}: a column name occurs twice among {names}. Rename or remove one of them.")
    return wanted


def table_rows(path: Path, choose: Chooser, accepted: str, nullable: Callable[[str], bool] = lambda _: False) -> Rows:
    """Rows of a JSONL, CSV, TSV or Parquet file, by its suffix; InputError with the ``accepted`` formats for others."""
    suffix = suffix_of(existing(path))
    if suffix == ".jsonl":
        return json_rows(path)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, choose, nullable)
    if suffix == ".parquet":
        return parquet_rows(path, choose)
    raise InputError(f"{path}: unknown format. Give {accepted}.")


def parquet_rows(path: Path, choose: Chooser) -> Rows:
    """Read the columns that ``choose`` returns from a Parquet file, some rows at a time; rows count from 1."""
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = checked_header(str(path), file.schema_arrow.names, choose)
            for row, value in arrow_rows(file.iter_batches(batch_size=1024, columns=names, use_threads=False)):
                yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}:{row + 1}: not readable as Parquet ({error}). Write the file again.") from error


def split_of_pairs(location: str, splits: list[str]) -> str:
    """The split to read pairs of: train, or else the only split, unless it is named as a test set is."""
    if "train" in splits:
        return "train"
    if len(splits) == 1 and not splits[0].lower().startswith(("test", "dev", "val", "eval")):
        return splits[0]
    raise InputError(f"{location}: no split 'train' to read pairs of. {listed('Rename one of', splits)}")


def dataset_rows(folder: Path, choose: Chooser) -> Rows:
    """Read a folder written by datasets' ``save_to_disk``; of several splits the one of `split_of_pairs`."""
    import datasets  # noqa: PLC0415 - takes over a second, and only folders of this kind need it

    try:
        loaded = datasets.load_from_disk(str(folder))
    except IndexError as error:  # newer versions of datasets cannot load what has no rows
        raise InputError(
            f"{folder}: this saved dataset, or a split of it, has no rows. Save those with rows."
        ) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not readable as a saved dataset ({error}). Save it again.") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[split_of_pairs(str(folder), sorted(loaded))]
    names = checked_header(str(folder), loaded.column_names, choose)
    yield from arrow_rows(loaded.select_columns(names).with_format("arrow").iter(batch_size=1024))


def arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Rows:
    """Rows of Arrow tables, which count from 1."""
    row = 0
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for index in range(batch.num_rows):
            row += 1
            try:
                value: Row | BadRow = {name: column[index].as_py() for name, column in columns.items()}
            except UnicodeDecodeError:
                value = BadRow("the row is not valid UTF-8")
            yield row, value
