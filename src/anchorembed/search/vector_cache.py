"""Vectors kept on disk under a hash of all that decides them, and read back memory-mapped."""

import json
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
from anchorembed.system.files import hash_texts, whole_file


class Texts(Protocol):
    """Texts in order that can be iterated over more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True)
class VectorCache:
    """Unit vectors of texts. Each file's name is a hash of model, number format, side, instruction and texts."""

    embedder: Embedder
    folder: Path

    def vectors(
        self,
        texts: Texts,
        side: Side,
        instruction: str | None,
        progress: Callable[[int], None] | None = None,
    ) -> Floats:
        """Unit vectors of texts, float32 [N, H], from disk if they are there, else embedded now.

        Args:
            texts: N texts.
            side: as in `Embedder.encode`.
            instruction: as in `Embedder.encode`.
            progress: called with the number of texts done since the last call.

        Raises:
            InputError: as `Embedder.encode` does, or if the disk is full.
        """
        path = self.folder / f"{self._key(texts, side, instruction)}.npy"
        with suppress(OSError, ValueError):  # missing or damaged
            cached: Floats = np.load(path, mmap_mode="r")
            if cached.shape == (len(texts), self.embedder.dimension) and cached.dtype == np.float32:
                if progress:
                    progress(len(texts))
                return cached
        self._embed(path, texts, side, instruction, progress)
        embedded: Floats = np.load(path, mmap_mode="r")
        return embedded

    def _embed(
        self, path: Path, texts: Texts, side: Side, instruction: str | None, progress: Callable[[int], None] | None
    ) -> None:
        shape = (len(texts), self.embedder.dimension)
        with whole_file(path) as partial:
            if not len(texts):
                np.save(partial, np.zeros(shape, np.float32))
                return
            vectors_NH = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            _reserve(partial)
            done = 0
            for window in self.embedder.stream(texts, side, instruction, True, progress):
                vectors_NH[done : done + len(window)] = window
                done += len(window)
            vectors_NH.flush()

    def _key(self, texts: Texts, side: Side, instruction: str | None) -> str:
        parts = chain((self.embedder.fingerprint, str(self.embedder.dtype), side, json.dumps(instruction)), texts)
        return hash_texts(f"{len(part)}:{part}" for part in parts)[:32]


def _reserve(path: Path) -> None:
    """Allocate a mapped file's space: if the disk were full, a write to the map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def vector_table(ids: Sequence[str], vectors_NH: Floats) -> pa.Table:
    """Ids and vectors of texts as a table with columns ``id`` and ``vector``, a list of H floats."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NH.ravel()), vectors_NH.shape[1])
    return pa.table({"id": pa.array(ids, pa.string()), "vector": vectors})
