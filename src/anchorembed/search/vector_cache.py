"""Vectors kept on disk, named by a hash of model, texts and settings, and read back memory-mapped."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import Ranges, VectorFormat, cut, int8_ranges, quantize, restore
from anchorembed.model.vectors import Floats, Side
from anchorembed.system.files import hash_texts, whole_file

_ROWS = 1 << 16  # vectors quantised at once


class Texts(Protocol):
    """Texts in order that can be iterated over more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True)
class VectorCache:
    """Unit vectors of texts, in files named by a hash of model, dtype, side, instruction and texts."""

    embedder: Embedder
    folder: Path

    def vectors(
        self, texts: Texts, side: Side, instruction: str | None, progress: Callable[[int], None] | None = None
    ) -> Floats:
        """Unit vectors of texts, float32 [N, H]: read from disk, or else embedded as by `Embedder.encode`, and written.

        ``progress`` is called with the number of texts done since the last call.

        Raises:
            InputError: as `Embedder.encode` does, or if the disk is full.
        """
        path = self.folder / f"{self._key(texts, side, instruction)}.npy"
        shape = (len(texts), self.embedder.dimension)
        with suppress(OSError, ValueError, EOFError):  # missing or damaged
            cached: Floats = np.load(path, mmap_mode="r")
            if cached.shape == shape and cached.dtype == np.float32:
                if progress:
                    progress(len(texts))
                return cached
        with whole_file(path) as partial:
            vectors_NH = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            with partial.open("r+b") as file:
                _reserve(file.fileno(), partial.stat().st_size)
            done = 0
            for window in self.embedder.stream(texts, side, instruction, True, progress):
                vectors_NH[done : done + len(window)] = window
                done += len(window)
            vectors_NH.flush()
        embedded: Floats = np.load(path, mmap_mode="r")
        return embedded

    def _key(self, texts: Texts, side: Side, instruction: str | None) -> str:
        parts = chain((self.embedder.fingerprint, str(self.embedder.dtype), side, json.dumps(instruction)), texts)
        return hash_texts(f"{len(part)}:{part}" for part in parts)[:32]


def made_smaller(vectors_NH: Floats, form: VectorFormat, folder: Path) -> Floats:
    """Vectors as a search sees them after storage in ``form``: float32 [N, D], in a temporary file in ``folder``.

    The ranges of int8 are those of these vectors.
    """
    parts = [slice(start, start + _ROWS) for start in range(0, len(vectors_NH), _ROWS)]
    if not parts:
        return np.zeros((0, form.dimensions), np.float32)
    if form.precision == "int8":
        ranges: Ranges | None = None
        for part in parts:
            ranges = int8_ranges(cut(vectors_NH[part], form.dimensions), ranges)
        form = replace(form, ranges=ranges)
    shape = (len(vectors_NH), form.dimensions)
    with tempfile.TemporaryFile(dir=folder) as file:
        _reserve(file.fileno(), 4 * shape[0] * shape[1])
        small_ND = np.memmap(file, np.float32, "w+", shape=shape)
    for part in parts:
        small_ND[part] = restore(quantize(cut(vectors_NH[part], form.dimensions), form), form)
    return small_ND


def _reserve(descriptor: int, size: int) -> None:
    """Allocate a mapped file's space, as a write to the map of a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
