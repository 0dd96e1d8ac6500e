"""Texts embedded once: vectors kept on disk by what they were made from, and read back memory-mapped."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats, Side
from anchorembed.system.files import whole_file


class Texts(Protocol):
    """Texts in order, to be gone through more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True)
class VectorCache:
    """Unit vectors of lists of texts, by weights, template, lengths, number format, side, instruction and texts."""

    embedder: Embedder
    folder: Path

    def vectors(
        self,
        texts: Texts,
        side: Side,
        instruction: str,
        progress: Callable[[int], None] | None = None,
    ) -> Floats:
        """Vectors [N, H], float32, from disk if they were made before; ``progress`` gets the numbers of texts done."""
        path = self.folder / f"{self._key(texts, side, instruction)}.npy"
        with suppress(OSError, ValueError):  # not there, or damaged: made again
            kept: Floats = np.load(path, mmap_mode="r")
            if kept.shape == (len(texts), self.embedder.dimension) and kept.dtype == np.float32:
                if progress:
                    progress(len(texts))
                return kept
        self._make(path, texts, side, instruction, progress)
        made: Floats = np.load(path, mmap_mode="r")
        return made

    def _make(
        self, path: Path, texts: Texts, side: Side, instruction: str, progress: Callable[[int], None] | None
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shape = (len(texts), self.embedder.dimension)
        with whole_file(path) as partial:
            if not len(texts):
                np.save(partial, np.zeros(shape, np.float32))
                return
            kept = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            _reserve(partial)
            done = 0
            for window in self.embedder.stream(texts, side, instruction, progress=progress):
                kept[done : done + len(window)] = window
                done += len(window)
            kept.flush()

    def _key(self, texts: Texts, side: Side, instruction: str) -> str:
        digest = hashlib.sha256()
        for part in chain((self.embedder.fingerprint, str(self.embedder.dtype), side, instruction), texts):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()[:32]


def _reserve(path: Path) -> None:
    """Take the space of a file that is mapped: where the disk is full, writing to it later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error


def vector_table(ids: Sequence[str], vectors_NH: Floats) -> pa.Table:
    """Texts' ids and vectors as a table with columns ``id`` and ``vector``, a list of H floats."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NH.ravel()), vectors_NH.shape[1])
    return pa.table({"id": pa.array(ids, pa.string()), "vector": vectors})
