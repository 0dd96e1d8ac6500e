"""Vectors as columns of Arrow tables and Parquet files: a list of float32, int8, or bytes of packed bits for each text.

A file's metadata names the model and the format of its vectors, so that other vectors can be stored alike
and compared.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice, tee
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anchorembed.data.documents import Document
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import Ranges, Stored, VectorFormat, int8_ranges, quantize, vector_format
from anchorembed.model.vectors import Floats, Side
from anchorembed.system.files import whole_file

_log = logging.getLogger(__name__)
_KEY = b"anchorembed"  # in a file's metadata
_FEW = 100  # texts below which values of other texts often lie outside their ranges


@dataclass(frozen=True, slots=True)
class MadeBy:
    """A file's metadata: the fingerprint of the model that made its vectors, and how they are stored."""

    model: str
    form: VectorFormat

    def schema(self, schema: pa.Schema) -> pa.Schema:
        """A table's schema with this metadata."""
        record = {"model": self.model, "dimensions": self.form.dimensions, "precision": self.form.precision}
        return schema.with_metadata({_KEY: json.dumps(record | {"ranges": self.form.ranges})})


def read_made_by(path: Path) -> MadeBy:
    """The metadata of a Parquet file of vectors, or of a folder of parts.

    Raises:
        InputError: if it cannot be read, or `encode` did not write it.
    """
    file = next(iter(sorted(path.glob("part-*.parquet"))), path) if path.is_dir() else path
    try:
        record = json.loads((pq.read_schema(file).metadata or {})[_KEY])
        dimensions = int(record["dimensions"])
        form = vector_format(dimensions, dimensions, record["precision"], record["ranges"])
        return MadeBy(str(record["model"]), form)
    except (OSError, LookupError, TypeError, ValueError, InputError) as error:
        raise InputError(
            f"--like: {path} does not say how its vectors are stored ({error}). Give a file that encode wrote."
        ) from error


def made_by(embedder: Embedder, dimensions: int | None, precision: str | None, like: MadeBy | None) -> MadeBy:
    """The metadata for vectors of ``embedder``: ``like``, or the given dimensions and precision.

    Raises:
        InputError: if ``like`` is of another model, or dimensions or precision do not fit the model.
    """
    if like is None:
        form = vector_format(embedder.dimension, dimensions, precision or "float32")
        return MadeBy(embedder.fingerprint, form)
    if like.model != embedder.fingerprint:
        raise InputError(
            f"--like: its vectors were made with model {like.model[:12]}, not {embedder.fingerprint[:12]}. Encode with "
            "that model, or encode both sides again."
        )
    return like


def embedded(
    embedder: Embedder,
    documents: Iterable[Document],
    side: Side,
    instruction: str | None,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[list[Document], Floats]]:
    """Documents, some thousands at a time, with their vectors [N, H] as `Embedder.stream` gives them."""
    unread, waiting = tee(documents)
    texts = (document.text for document in unread)
    for vectors_NH in embedder.stream(texts, side, instruction, progress=progress):
        yield list(islice(waiting, len(vectors_NH))), vectors_NH


def vector_batch(ids: Sequence[str], vectors_NB: Stored, **texts: Sequence[str]) -> pa.RecordBatch:
    """Columns ``id``, ``texts`` by their names, and ``vector``: a list of B numbers in each row."""
    columns = {name: pa.array(values, pa.string()) for name, values in {"id": ids, **texts}.items()}
    return pa.RecordBatch.from_pydict(columns | {"vector": _column(vectors_NB)})


def matrix(column: pa.Array) -> Stored:
    """A column of lists of B numbers as [N, B]."""
    numbers: Stored = column.flatten().to_numpy()
    return numbers.reshape(-1, column.type.list_size)


@contextmanager
def in_format(
    batches: Iterable[pa.RecordBatch], form: VectorFormat, folder: Path
) -> Iterator[tuple[VectorFormat, Iterator[pa.RecordBatch]]]:
    """Convert batches of float32 vectors [N, D], at least one; yields the format, with int8's ranges, and the batches.

    For int8 without ranges, all vectors are first written to a temporary file in ``folder`` to measure the ranges.
    """
    if form.precision != "int8" or form.ranges is not None:
        yield form, (_in_format(batch, form) for batch in batches)
        return
    remaining = iter(batches)
    first_batch = next(remaining)
    with tempfile.TemporaryFile(dir=folder) as spool:
        ranges: Ranges | None = None
        with pa.ipc.new_stream(spool, first_batch.schema) as writer:
            for batch in chain([first_batch], remaining):
                ranges = int8_ranges(matrix(batch["vector"]), ranges)
                writer.write_batch(batch)
        spool.seek(0)
        form = replace(form, ranges=ranges)
        yield form, (_in_format(batch, form) for batch in pa.ipc.open_stream(spool))


def write_vectors(out: Path, batches: Iterable[pa.RecordBatch], made_by: MadeBy) -> int:
    """Write batches of float32 vectors, at least one, to a Parquet file in a format; returns the number of vectors.

    Raises:
        InputError: if the file cannot be written, or int8's ranges would be those of one text.
    """
    count = 0
    with whole_file(out) as unfinished, in_format(batches, made_by.form, out.parent) as (form, converted):
        first_batch = next(converted)
        schema = replace(made_by, form=form).schema(first_batch.schema)
        with pq.ParquetWriter(unfinished, schema) as writer:
            for batch in chain([first_batch], converted):
                writer.write_batch(batch)
                count += len(batch)
        if form != made_by.form:
            _check_calibrated(count)
    return count


def _check_calibrated(texts: int) -> None:
    if texts < 2:
        raise InputError("--precision: int8 takes its ranges from the texts, and there is one. Give more, or --like.")
    if texts < _FEW:
        _log.warning(f"int8: the ranges are those of {texts} texts; vectors encoded with --like are clipped to them")


def _in_format(batch: pa.RecordBatch, form: VectorFormat) -> pa.RecordBatch:
    position = batch.schema.get_field_index("vector")
    return batch.set_column(position, "vector", _column(quantize(matrix(batch["vector"]), form)))


def _column(vectors_NB: Stored) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors_NB).ravel()), vectors_NB.shape[1])
