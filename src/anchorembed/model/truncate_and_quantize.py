"""Smaller vectors: only the first components, and each stored as float32, int8 or one bit.

A vector is cut to its first D components and scaled to length 1 again. ``int8`` divides the range of each component
into 255 steps, and ``binary`` keeps whether a component is positive, eight to a byte: both are sentence-transformers'
`quantize_embeddings` (its ``int8`` and ``ubinary``). To compare, stored vectors are restored: an int8 is the middle of
its step, a bit is -1 or 1, and the row is scaled to length 1.

Axes: N vectors, H hidden size, D components kept, B bytes of a stored vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from anchorembed.errors import InputError, nearest
from anchorembed.model.vectors import Floats, check_finite, unit_rows

StoredPrecision = Literal["float32", "int8", "binary"]
Ranges = Sequence[Sequence[float]]  # smallest and largest value of each component, D numbers each
Stored = NDArray[Any]  # float32 [N, D], int8 [N, D], or uint8 [N, D / 8] of packed bits


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How vectors are stored: the first ``dimensions`` components, their precision, and int8's ranges once known."""

    dimensions: int
    precision: StoredPrecision = "float32"
    ranges: Ranges | None = None

    @property
    def bytes(self) -> int:
        """Size of a stored vector."""
        return {"float32": 4 * self.dimensions, "int8": self.dimensions, "binary": self.dimensions // 8}[self.precision]

    def __str__(self) -> str:
        return f"{self.dimensions}d-{self.precision}"


def vector_format(
    full: int, dimensions: int | None = None, precision: str = "float32", ranges: Ranges | None = None
) -> VectorFormat:
    """Return a checked format; ``full`` is H, the default of ``dimensions``, and ``ranges`` may be lists of JSON.

    Raises:
        InputError: if ``dimensions`` is not between 1 and H, or no multiple of 8 where bits are packed, the precision
            is unknown, or ``ranges`` is of another number of components.
    """
    kept = full if dimensions is None else dimensions
    if not 1 <= kept <= full:
        fault = "below 1" if kept < 1 else f"above {full}, the length of the model's vectors"
        raise InputError(f"--dimensions: {kept} is {fault}. Give a number from 1 to {full}.")
    names = get_args(StoredPrecision)
    if precision not in names:
        raise InputError(f"--precision: {precision!r} is unknown.{nearest(precision, names)} Use {', '.join(names)}.")
    if precision == "binary" and kept % 8:
        fault = f"--dimensions: {kept} is no multiple of 8, as --precision binary packs 8 into a byte."
        raise InputError(f"{fault} Give {max(8, kept - kept % 8)}.")
    if ranges is not None and np.shape(ranges) != (2, kept):
        raise InputError(f"ranges: {np.shape(ranges)} numbers, not 2 x {kept}. Give int8_ranges of vectors as long.")
    return VectorFormat(kept, cast("StoredPrecision", precision), None if ranges is None else tuple(map(tuple, ranges)))


def vector_formats(full: int, dimensions: Sequence[int], precisions: Sequence[str]) -> list[VectorFormat]:
    """Full vectors first, then each of the dimensions at each of the precisions; raises as `vector_format` does."""
    forms = [vector_format(full, kept, name) for kept in dimensions or [full] for name in precisions or ["float32"]]
    return list(dict.fromkeys([VectorFormat(full), *forms]))


def read_dimensions(listed: str) -> list[int]:
    """Read ``256,128``.

    Raises:
        InputError: if a part is no whole number.
    """
    try:
        return [int(part) for part in listed.split(",") if listed]
    except ValueError as error:
        raise InputError(f"--dimensions: {listed!r} is not whole numbers with commas. Write 256,128.") from error


def cut(vectors_NH: Floats, dimensions: int, normalize: bool = True) -> Floats:
    """The first components of each row, scaled to length 1: float32 [N, D]; rows of D components stay as they are."""
    if dimensions == vectors_NH.shape[1]:
        return vectors_NH
    return unit_rows(vectors_NH[:, :dimensions]) if normalize else vectors_NH[:, :dimensions]


def int8_ranges(vectors_ND: Floats, known: Ranges | None = None) -> Ranges:
    """Smallest and largest value of each component, over these vectors and the ``known`` ranges of others."""
    rows = vectors_ND if known is None else np.vstack([np.array(known, np.float32), vectors_ND])
    return tuple(rows.min(axis=0).tolist()), tuple(rows.max(axis=0).tolist())


def quantize(vectors_ND: Floats, form: VectorFormat) -> Stored:
    """Vectors as they are stored: float32 [N, D], int8 [N, D], or uint8 [N, D / 8] of packed bits.

    Raises:
        InputError: if a vector is not finite, or int8's ranges are missing.
    """
    if form.precision == "float32":
        return vectors_ND
    check_finite(vectors_ND)
    if form.precision == "binary":
        return np.packbits(vectors_ND > 0, axis=-1)
    starts_D, steps_D = _steps(form)
    levels_ND = np.floor((vectors_ND - starts_D) / np.where(steps_D == 0, 1, steps_D))
    return np.asarray(np.clip(levels_ND, 0, 255) - 128).astype(np.int8)


def restore(stored_NB: Stored, form: VectorFormat) -> Floats:
    """Stored vectors as they are compared: float32 [N, D], scaled to length 1 unless stored as float32."""
    if form.precision == "float32":
        return stored_NB
    if form.precision == "binary":
        return unit_rows(np.unpackbits(stored_NB, axis=-1).astype(np.float32) * 2 - 1)
    starts_D, steps_D = _steps(form)
    return unit_rows(starts_D + (stored_NB.astype(np.float32) + np.float32(128.5)) * steps_D)


def _steps(form: VectorFormat) -> tuple[Floats, Floats]:
    """Where each component's first step starts, and the length of its steps."""
    if form.ranges is None:
        raise InputError("precision: int8 needs the ranges of the documents' components. Give ranges=int8_ranges(...).")
    starts_D, ends_D = np.array(form.ranges, np.float32)
    return starts_D, (ends_D - starts_D) / 255
