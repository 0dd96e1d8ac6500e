"""Pairs on disk: each source is read once into a memory-mapped Arrow file, reused while its content is the same.

A pair's ``query_key`` and ``positive_key`` are 64-bit hashes of its texts, by which sampling sees duplicates without
reading text.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anchorembed.errors import InputError
from anchorembed.records import TextPair, read_pairs

_VERSION = b"1"
_SCHEMA = pa.schema(
    {
        "query": pa.large_string(),
        "positive": pa.large_string(),
        "negatives": pa.list_(pa.large_string()),
        "line": pa.int64(),
        "query_key": pa.uint64(),
        "positive_key": pa.uint64(),
    }
)
_ROWS = 8192


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A named source of pairs and the instruction of its queries."""

    name: str
    path: Path
    instruction: str = ""


class PairStore:
    """All pairs of several sources, by global index; only the pairs asked for are read from disk."""

    def __init__(self, sources: Sequence[SourceFile], tables: Sequence[pa.Table]) -> None:
        self.sources = tuple(sources)
        self._tables = tuple(tables)
        self.bounds = np.cumsum([0, *(table.num_rows for table in tables)])
        self.query_keys = self._keys("query_key")
        self.positive_keys = self._keys("positive_key")

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def source_of(self, index: int) -> int:
        """Number of the source that a pair is from."""
        return int(np.searchsorted(self.bounds, index, side="right")) - 1

    def __getitem__(self, index: int) -> TextPair:
        source = self.source_of(index)
        table, row = self._tables[source], index - int(self.bounds[source])
        query, positive, negatives, line = (table.column(name)[row].as_py() for name in _SCHEMA.names[:4])
        return TextPair(query, positive, tuple(negatives), self.sources[source].name, line)

    def _keys(self, column: str) -> NDArray[np.uint64]:
        return np.concatenate([table.column(column).to_numpy() for table in self._tables])


def open_store(
    sources: Sequence[SourceFile],
    cache: Path,
    *,
    skip_bad: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> PairStore:
    """Open the sources, converting those whose content is not in ``cache`` yet.

    Raises:
        InputError: if a source is missing, has a bad line (unless ``skip_bad``), or no usable pair.
    """
    return PairStore(sources, [_open(source, cache, skip_bad, log) for source in sources])


def _open(source: SourceFile, cache: Path, skip_bad: bool, log: Callable[[str], None]) -> pa.Table:
    key = hashlib.sha256(f"{content_key(source.path)} {skip_bad}".encode()).hexdigest()[:32]
    target = cache / f"{key}.arrow"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        dropped: list[str] = []
        pairs = read_pairs(source.path, source=source.name, skip_bad=skip_bad, on_skip=dropped.append)
        temporary = cache / f".{key}.{os.getpid()}"
        try:
            rows = _write(pairs, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        log(f"{source.name}: {rows} pairs read from {source.path}")
        if dropped:
            log(f"{source.name}: {len(dropped)} bad lines dropped, the first: {dropped[0]}")
    return pa.ipc.open_file(pa.memory_map(str(target))).read_all()


def _write(pairs: Iterator[TextPair], target: Path) -> int:
    rows = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while batch := list(islice(pairs, _ROWS)):
            columns = [
                [pair.query for pair in batch],
                [pair.positive for pair in batch],
                [list(pair.negatives) for pair in batch],
                [pair.line for pair in batch],
                [_text_key(pair.query) for pair in batch],
                [_text_key(pair.positive) for pair in batch],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            rows += len(batch)
    return rows


def _text_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def content_key(path: Path) -> str:
    """SHA-256 of a source's bytes, file by file, with what decides how they are read.

    Raises:
        InputError: if there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check data.sources; paths are relative to where you run.")
    digest = hashlib.sha256(_VERSION)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path) if path.is_dir() else path.suffixes}".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
