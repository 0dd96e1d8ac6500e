"""Pairs and corpora on disk: each source is converted once to a memory-mapped Arrow file, found by its content hash.

A pair's ``query_key`` and ``positive_key`` are 64-bit hashes of its texts: sampling finds duplicates without reading
text.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from anchorembed.data.documents import Document, read_corpus
from anchorembed.data.pairs import TextPair, content_of, read_pairs
from anchorembed.system.files import cache_folder, hash_content, hash_texts, whole_file, whole_folder

_log = logging.getLogger(__name__)

_PAIR_SCHEMA = pa.schema(
    {
        "query": pa.large_string(),
        "positive": pa.large_string(),
        "negatives": pa.list_(pa.large_string()),
        "line": pa.int64(),
        "scores": pa.list_(pa.float64()),
        "query_key": pa.uint64(),
        "positive_key": pa.uint64(),
    }
)
_DOCUMENT_SCHEMA = pa.schema({"id": pa.large_string(), "text": pa.large_string()})
_PAIRS, _NOTES = "pairs.arrow", "notes.json"  # files of a converted source
_VARYING = re.compile(r"""'[^']*'|\d+""")  # in faults of one kind: what is quoted, and numbers
_ROWS_PER_BATCH = 8192
_DOCUMENTS_AT_ONCE = 100  # read from disk


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A named source of pairs; ``instruction`` goes before its queries and, if ``symmetric``, before its documents."""

    name: str
    path: str | Path
    instruction: str | None = None
    symmetric: bool = False


class PairStore:
    """All pairs of several sources, by global index; pairs are read from disk when they are accessed.

    ``dropped[source]`` counts the lines that held no usable pair, by reason.
    """

    def __init__(
        self, sources: Sequence[SourceFile], tables: Sequence[pa.Table], dropped: Sequence[dict[str, int]]
    ) -> None:
        self.sources = tuple(sources)
        self.dropped = tuple(dropped)
        self._tables = tuple(tables)
        self.bounds = np.cumsum([0, *(table.num_rows for table in tables)])
        self.query_keys = self._keys("query_key")
        self.positive_keys = self._keys("positive_key")

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def scored(self) -> int:
        """How many pairs have given scores, of the positive and at least one negative."""
        lengths = (pc.list_value_length(table.column("scores")) for table in self._tables)
        return sum(int(pc.sum(pc.greater(length, 1)).as_py() or 0) for length in lengths)

    @property
    def most_negatives(self) -> int:
        """The largest number of hard negatives that a pair has."""
        lengths = (pc.list_value_length(table.column("negatives")) for table in self._tables)
        return max(int(pc.max(length).as_py() or 0) for length in lengths)

    def source_of(self, index: int) -> int:
        """Index of the source that a pair is from."""
        return int(np.searchsorted(self.bounds, index, side="right")) - 1

    def __getitem__(self, index: int) -> TextPair:
        source = self.source_of(index)
        row = index - int(self.bounds[source])
        return next(self._pairs(source, self._tables[source].slice(row, 1)))

    def chunks(self, source: int) -> Iterator[list[TextPair]]:
        """All pairs of a source, thousands at a time."""
        for batch in self._tables[source].to_batches():
            yield list(self._pairs(source, batch))

    def _pairs(self, source: int, rows: pa.Table | pa.RecordBatch) -> Iterator[TextPair]:
        columns = (rows.column(name).to_pylist() for name in _PAIR_SCHEMA.names[:5])
        for query, positive, negatives, line, scores in zip(*columns, strict=True):
            yield TextPair(query, positive, tuple(negatives), self.sources[source].name, line, tuple(scores))

    def _keys(self, column: str) -> NDArray[np.uint64]:
        return np.concatenate([table.column(column).to_numpy() for table in self._tables])


def open_store(sources: Sequence[SourceFile], cache: Path, *, skip_bad: bool = False) -> PairStore:
    """Open the sources; a source that is not in ``cache``, by its content hash, is converted first.

    Raises:
        InputError: if a source is missing, has a bad line (unless ``skip_bad``), or no usable pair.
    """
    folders = [_convert(source, cache, skip_bad) for source in sources]
    tables = [pa.ipc.open_file(pa.memory_map(str(folder / _PAIRS))).read_all() for folder in folders]
    dropped = [_dropped_lines(source.name, folder) for source, folder in zip(sources, folders, strict=True)]
    return PairStore(sources, tables, dropped)


@cache  # a run opens its pairs several times, and says this once
def _dropped_lines(name: str, folder: Path) -> dict[str, int]:
    """Numbers of a converted source's dropped lines, by reason; they and its unused columns are logged."""
    notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
    for reason, count in notes["dropped"].items():
        _log.info("%s: %d %s dropped: %s", name, count, "line" if count == 1 else "lines", reason)
    if notes["unused"]:
        _log.info("%s: columns that are not used: %s", name, notes["unused"])
    return dict(notes["dropped"])


def _convert(source: SourceFile, cache: Path, skip_bad: bool) -> Path:
    """Return the folder with a source's pairs and notes on unused lines and columns; make it if it does not exist."""
    target = cache / hash_texts([f"{content_of(source.path)} {skip_bad}"])[:32]
    if not all((target / name).is_file() for name in (_PAIRS, _NOTES)):  # what empties a cache may leave folders
        dropped, unused = _Dropped(in_folder=Path(source.path).is_dir()), list[str]()
        on_skip = dropped.add if skip_bad else None
        pairs = read_pairs(source.path, source=source.name, on_skip=on_skip, on_unused=unused.append)
        with whole_folder(target) as partial:
            rows = _write_pairs(pairs, partial / _PAIRS)
            notes = {"dropped": dropped.counts, "unused": "".join(unused)}
            (partial / _NOTES).write_text(json.dumps(notes), encoding="utf-8")
        _log.info("%s: %d pairs read from %s", source.name, rows, source.path)
    return target


class _Dropped:
    """Counts dropped lines by reason; those that differ in numbers or quoted words alone are one, as the first."""

    def __init__(self, *, in_folder: bool) -> None:
        self.counts: Counter[str] = Counter()  # each reason names its first line
        self._reasons: dict[str, str] = {}
        self._in_folder = in_folder

    def add(self, fault: str) -> None:
        """Count a fault as `read_pairs` words it: ``path:line: what is wrong``."""
        path, line, words = re.split(r":(\d+): ", fault, maxsplit=1)
        place = f"line {line} of {Path(path).name}" if self._in_folder else f"line {line}"
        self.counts[self._reasons.setdefault(_VARYING.sub("N", words), f"{words} First on {place}.")] += 1


def _write_pairs(pairs: Iterator[TextPair], target: Path) -> int:
    """Write pairs as an Arrow file and return their number."""
    rows = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _PAIR_SCHEMA) as writer:
        while batch := list(islice(pairs, _ROWS_PER_BATCH)):
            columns = {
                "query": [pair.query for pair in batch],
                "positive": [pair.positive for pair in batch],
                "negatives": [pair.negatives for pair in batch],
                "line": [pair.line for pair in batch],
                "scores": [pair.scores for pair in batch],
                "query_key": [text_key(pair.query) for pair in batch],
                "positive_key": [text_key(pair.positive) for pair in batch],
            }
            writer.write_batch(pa.record_batch(columns, schema=_PAIR_SCHEMA))
            rows += len(batch)
    return rows


# --- Corpora ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredDocuments:
    """Documents from a table with columns ``id``, ``text`` and maybe ``title``; texts are read while iterating."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def ids(self) -> list[str]:
        """All ids, without reading texts."""
        return [str(name) for name in self.table.column("id").to_pylist()]

    def __iter__(self) -> Iterator[Document]:
        for batch in self.table.to_batches(max_chunksize=_DOCUMENTS_AT_ONCE):
            for row in batch.to_pylist():
                title = row.get("title")
                yield Document(str(row["id"]), f"{title} {row['text']}" if title else row["text"])  # as mteb joins them


def open_corpus(path: Path) -> StoredDocuments:
    """A BEIR corpus, memory-mapped from the cache; if it is not there, by its content hash, it is converted first.

    Raises:
        InputError: as `read_corpus` does.
    """
    target = cache_folder() / "corpora" / f"{hash_content(path)}.arrow"
    if not target.exists():
        documents = read_corpus(path)
        with (
            whole_file(target) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_stream(sink, _DOCUMENT_SCHEMA) as writer,
        ):
            while batch := list(islice(documents, _ROWS_PER_BATCH)):
                columns = {"id": [document.id for document in batch], "text": [document.text for document in batch]}
                writer.write_batch(pa.record_batch(columns, schema=_DOCUMENT_SCHEMA))
    return StoredDocuments(pa.ipc.open_stream(pa.memory_map(str(target))).read_all())


def text_key(text: str) -> int:
    """64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
