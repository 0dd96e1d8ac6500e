"""An index keeps a corpus as unit vectors in LanceDB and finds the documents nearest to a query.

An index is a folder, written whole or not at all: a table and a manifest (`manifest`). When it is replaced, the old
table stays beside the new one for readers that have it open. A query stays float32; its score is the cosine with the
stored vector, restored as in `model.truncate_and_quantize`. Search is exact: LanceDB proposes candidates in float32, or
all int8 or binary vectors are compared; then the candidates' cosines are computed in float64. Of equal scores, the
smaller document id comes first.

Axes: N texts, D documents, H components of a vector, B numbers that store one.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

import lancedb
import pyarrow as pa
from lancedb.query import LanceVectorQueryBuilder
from lancedb.table import Table

from anchorembed.data.documents import Document, read_corpus
from anchorembed.errors import InputError, first_line
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import VectorFormat, cut, restore
from anchorembed.model.vectors import Floats, cosines, near_top, rounding, unit_rows
from anchorembed.search.columns import embedded, in_format, matrix, vector_batch
from anchorembed.search.manifest import FORMAT, MANIFEST, Manifest, identity_of, read_manifest
from anchorembed.system.files import hash_file, lock_folder, whole_folder


@dataclass(frozen=True, slots=True)
class Hit:
    """A result of a search: ``rank`` counts from 1, ``score`` is the document's cosine with the query."""

    rank: int
    id: str
    score: float
    text: str


class Index:
    """A folder of embedded documents that can be searched with the model that embedded them."""

    def __init__(self, folder: Path, manifest: Manifest, table: Table, identity: tuple[int, int]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.form = manifest.form
        self._table = table
        self._opened = identity

    def __len__(self) -> int:
        """Return D, the number of documents."""
        return self.manifest.documents

    @classmethod
    def build(
        cls,
        embedder: Embedder,
        documents: Iterable[Document],
        folder: Path,
        progress: Callable[[int], None] | None = None,
        corpus_hash: str = "",
        form: VectorFormat | None = None,
    ) -> "Index":
        """Embed documents into an index in ``folder``, which replaces an older index there, and open it.

        Args:
            embedder: the model.
            documents: streamed, D of them, at least one; each has an id of its own.
            folder: to write.
            progress: called with the number of documents embedded since the last call.
            corpus_hash: SHA-256 of the corpus file, for the manifest.
            form: how vectors are stored, by default float32 with all dimensions; int8's ranges are the documents'.

        Raises:
            InputError: if ``folder`` holds something that is not an index.
        """
        form = form or VectorFormat(embedder.dimension)
        batches = _batches(embedder, documents, form.dimensions, progress)
        with whole_folder(folder) as building, in_format(batches, form, building) as (form, converted):
            name = f"documents-{uuid4().hex[:12]}"
            count = _write_table(building, name, converted)
            ranges = form.ranges or ()
            manifest = Manifest(
                FORMAT, embedder.fingerprint, form.dimensions, count, corpus_hash, form.precision, ranges, name
            )
            _keep_replaced(folder, building)
            (building / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Open the index in ``folder``.

        Raises:
            InputError: if there is none or it is damaged.
        """
        identity = identity_of(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"{folder}: there is no index here. Build one first, or give an index's folder.")
        fault = ""
        try:
            table = lancedb.connect(folder).open_table(manifest.table)
            if (count := table.count_rows()) != manifest.documents:
                fault = f"{count} documents stored, {manifest.documents} in {MANIFEST}"
        except (OSError, RuntimeError, ValueError) as error:
            fault = first_line(error)
        if identity_of(folder) != identity:  # replaced while it was opened
            return cls.open(folder)
        if fault:
            raise InputError(_damaged(folder, fault))
        return cls(folder, manifest, table, identity)

    def search(self, embedder: Embedder, query: str, top_k: int = 10) -> list[Hit]:
        """Return the ``top_k`` documents nearest to ``query``, or all if there are fewer; equal scores by id.

        Raises:
            InputError: if ``top_k`` is below 1 or ``embedder`` is not the model that made the index.
        """
        if top_k < 1:
            raise InputError(f"top_k: {top_k} is below 1. Ask for at least one document.")
        if embedder.fingerprint != self.manifest.model:
            raise InputError(
                f"{self.folder}: the index was made with model {self.manifest.model[:12]}, "
                f"not {embedder.fingerprint[:12]}. Search with that model, or build the index again."
            )
        top_k = min(top_k, len(self))
        query_H = cut(unit_rows(embedder.encode([query], "query")), self.form.dimensions)[0]
        find = self._candidates if self.form.precision == "float32" else self._compared
        try:
            candidates = find(query_H, top_k)
        except (OSError, RuntimeError, ValueError) as error:
            if identity_of(self.folder) == self._opened:
                raise InputError(_damaged(self.folder, first_line(error))) from error
            raise InputError(
                f"{self.folder}: the index was replaced or removed after it was opened. Open it again."
            ) from error
        ids, texts = candidates["id"].to_pylist(), candidates["text"].to_pylist()
        scores = cosines(query_H, self._restored(candidates)).tolist()
        order = sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))
        return [Hit(rank, ids[row], scores[row], texts[row]) for rank, row in enumerate(order[:top_k], start=1)]

    def _candidates(self, query_H: Floats, top_k: int) -> pa.Table:
        """Rows of the nearest documents: enough that none of the ``top_k`` best is missing because of rounding."""
        limit = 2 * top_k
        while True:
            search = cast(LanceVectorQueryBuilder, self._table.search(query_H, vector_column_name="vector"))
            search = search.distance_type("dot").select(["id", "text", "vector", "_distance"])
            rows = search.limit(limit).to_arrow()
            distances = rows["_distance"].to_numpy()
            if len(distances) < limit or distances[-1] - distances[top_k - 1] > rounding(len(query_H)):
                return rows
            limit *= 4

    def _compared(self, query_H: Floats, top_k: int) -> pa.Table:
        """Rows that may be among the ``top_k`` best, given rounding; all rows are compared, batch by batch."""
        best: pa.Table | None = None
        # LanceDB cannot compare floats with int8 or packed bits.
        for batch in self._table.search().select(["id", "text", "vector"]).to_batches():
            rows = pa.Table.from_batches([batch])
            rows = rows if best is None else pa.concat_tables([best, rows])
            scores = self._restored(rows) @ query_H
            best = rows.take(near_top(scores, top_k, rounding(len(query_H))))
        return best

    def _restored(self, rows: pa.Table) -> Floats:
        return restore(matrix(rows["vector"].combine_chunks()), self.form)


def open_or_build(
    embedder: Embedder,
    corpus: Path,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    form: VectorFormat | None = None,
) -> tuple[Index, bool]:
    """Return an index of the file ``corpus``, and whether the one in ``folder`` was reused.

    An index made from the same bytes by the same model in the same format is reused; any other index there is replaced.
    While another process makes one there, this waits, and then reuses that if it fits.

    Raises:
        InputError: if the folder holds something else, or an index whose manifest is damaged; nothing is changed then.
    """
    if not corpus.is_file():
        raise InputError(f"{corpus}: there is no such corpus file. Give the path of a corpus.")
    corpus_hash = hash_file(corpus)
    form = form or VectorFormat(embedder.dimension)

    def fits() -> bool:
        manifest = read_manifest(folder)
        return manifest is not None and manifest.fits(embedder.fingerprint, corpus_hash, form)

    if fits():
        return Index.open(folder), True
    with lock_folder(folder, wait=True):
        if fits():  # made meanwhile
            return Index.open(folder), True
        return Index.build(embedder, read_corpus(corpus), folder, progress, corpus_hash, form), False


def _keep_replaced(folder: Path, building: Path) -> None:
    """Link the old table into the new index, so that readers can use it until the index is replaced once more."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    table = f"{manifest.table}.lance"
    try:
        shutil.copytree(folder / table, building / table, copy_function=os.link)
    except (OSError, shutil.Error):  # a file system without hard links: readers have to open the index again
        shutil.rmtree(building / table, ignore_errors=True)


def _damaged(folder: Path, fault: str) -> str:
    return f"{folder}: the index is damaged ({fault}). Delete the folder and build it again."


def _batches(
    embedder: Embedder, documents: Iterable[Document], dimensions: int, progress: Callable[[int], None] | None
) -> Iterator[pa.RecordBatch]:
    """Ids, texts and float32 vectors of documents."""
    for window, vectors_NH in embedded(embedder, documents, "document", None, progress):
        ids, texts = [document.id for document in window], [document.text for document in window]
        yield vector_batch(ids, cut(unit_rows(vectors_NH), dimensions), text=texts)


def _write_table(building: Path, name: str, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches, at least one, into a new table, and return the number of rows.

    LanceDB's errors about files, such as a full disk, are raised as OSError.
    """
    writes = (pa.Table.from_batches([batch]) for batch in batches)
    try:
        table = lancedb.connect(building).create_table(name, next(writes))
        for rows in writes:
            table.add(rows)
        # Merge the writes and drop older versions. An age of zero would give a warning about other readers.
        table.optimize(cleanup_older_than=timedelta(milliseconds=1))
        return int(table.count_rows())
    except RuntimeError as error:
        if "LanceError(IO)" in str(error):
            raise OSError(errno.EIO, first_line(error)) from error
        raise
