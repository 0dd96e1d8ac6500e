"""Make vectors, search by them, read them: `encode`, `search` and `read`."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anchorembed.data.documents import read_texts
from anchorembed.errors import InputError, extra, first_line
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import StoredPrecision, cut, vector_format
from anchorembed.model.vectors import Floats, Side
from anchorembed.search.columns import embedded, made_by, read_made_by, vector_batch, write_vectors
from anchorembed.search.ray import Job, encode_by_ray
from anchorembed.system.files import cache_folder, check_writable, hash_texts
from anchorembed.system.progress import counting_bar
from anchorembed.train.read_vector import NEUTRAL, Reading
from anchorembed.train.read_vector import read as read_vector

if TYPE_CHECKING:  # needs an extra, which only `search` imports
    from anchorembed.search.index import Hit


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits of a query, the index's folder, and whether an existing index was reused."""

    hits: "list[Hit]"
    index: Path
    reused: bool


def encode(  # noqa: PLR0913 - the options of a verb
    model: str | Path,
    texts: str | Path,
    out: str | Path,
    *,
    side: Side = "document",
    instruction: str | None = None,
    dimensions: int | None = None,
    precision: StoredPrecision | None = None,
    like: str | Path | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
) -> int:
    """Embed a file of texts into Parquet with columns ``id`` and ``vector``; returns the number of texts.

    The file's metadata has, under ``anchorembed``, the model's fingerprint, dimensions, precision and int8's ranges.

    Args:
        model: as in `evaluate`.
        texts: JSONL or text file.
        out: file to write; with Ray a folder of parts.
        side: query or document.
        instruction: as in `Embedder.encode`.
        dimensions: components to keep of each vector; by default all.
        precision: format of the vectors: ``float32``, the default, ``int8`` with the ranges of these texts, or
            ``binary``, packed bits.
        like: file of vectors of the same model, whose dimensions, precision and ranges are used.
        engine: ``ray`` for many machines or processes.
        workers: of Ray, as in `search.ray.encode_by_ray`.
    """
    out = Path(out)
    if engine not in ("local", "ray"):
        raise InputError(f"engine: {engine!r} is unknown. Use local or ray.")
    if workers is not None and engine != "ray":
        raise InputError(f"--workers: {workers} has no effect without --engine ray. Add that, or leave workers out.")
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist. Make it, or name another file.")
    if like and (dimensions is not None or precision):
        raise InputError(f"--like: {like} says dimensions and precision. Leave --dimensions and --precision out.")
    if engine == "local":
        check_writable(out, texts, like)
    job = Job(str(model), side, instruction, dimensions, precision, read_made_by(Path(like)) if like else None)
    documents = read_texts(Path(texts))
    documents = chain([next(documents)], documents)  # a fault in the first line is reported before the model is loaded
    with counting_bar("embedding", None) as advance:
        if engine == "ray":
            return encode_by_ray(documents, out, job, workers=workers, progress=advance)
        embedder = Embedder.load(model)
        metadata = made_by(embedder, dimensions, precision, job.like)
        dimensions, scales = metadata.form.dimensions, embedder.metadata.normalize
        batches = (
            vector_batch([document.id for document in window], cut(vectors_NH, dimensions, scales))
            for window, vectors_NH in embedded(embedder, documents, side, instruction, advance)
        )
        return write_vectors(out, batches, metadata)


def search(
    model: str | Path,
    corpus: str | Path,
    query: str,
    *,
    index: str | Path | None = None,
    top_k: int = 10,
    dimensions: int | None = None,
    precision: StoredPrecision = "float32",
) -> SearchResult:
    """Search a corpus by meaning; the index is reused if it was made from the same corpus by the same model.

    ``dimensions`` and ``precision`` are those of the index's vectors, as in `encode`; int8's ranges are the corpus's.

    Raises:
        InputError: if query, corpus or index cannot be used, or the extra ``search`` is not installed.
    """
    with extra("search"):
        from anchorembed.search.index import open_or_build
    corpus = Path(corpus)
    if not query.strip() or query.encode(errors="replace").decode() != query:
        raise InputError("search: the query is empty or not Unicode text. Give some words.")
    if top_k < 1:
        raise InputError(f"--top-k: {top_k} is below 1. Ask for at least one hit.")
    if not corpus.is_file():
        fault = "is a folder" if corpus.is_dir() else "no such file"
        raise InputError(f"{corpus}: {fault}. Name a JSONL with _id, optional title, and text.")
    embedder = Embedder.load(model)
    form = vector_format(embedder.dimension, dimensions, precision)
    if index is None:
        name = hash_texts([str(corpus.resolve())])[:16]
        index = cache_folder() / "indexes" / f"{name}-{embedder.fingerprint[:16]}-{form}"
    with counting_bar("indexing", None) as advance:
        opened, reused = open_or_build(embedder, corpus, Path(index), progress=advance, form=form)
    return SearchResult(opened.search(embedder, query, top_k), Path(index), reused)


def read(
    model: str | Path,
    text: str | None = None,
    *,
    other: str = NEUTRAL[0],
    side: Side = "document",
    vectors: str | Path | None = None,
    id_: str | None = None,
) -> Reading:
    """What a vector, of a text or stored, says: its likeliest words, and what the decoder writes, beside another's.

    Args:
        model: as in `evaluate`.
        text: text to embed; with ``vectors``, the text whose likelihood is measured.
        other: a text to compare with.
        side: query or document.
        vectors: Parquet file of float vectors, from `encode`, or its folder of parts.
        id_: id of the vector in that file.

    Raises:
        InputError: as `train.read_vector.read` does, or if the file has no float vector with this id.
    """
    vector_H = None
    if vectors is not None:
        if id_ is None:
            raise InputError(f"{vectors}: which vector is to be read? Give its id: --id ID")
        vector_H = _stored_vector(Path(vectors), id_)
    return read_vector(Embedder.load(model), text, other=other, side=side, vector_H=vector_H)


def _stored_vector(path: Path, id_: str) -> Floats:
    """One vector of a Parquet file, or a folder of parts, with columns ``id`` and ``vector``, [H]."""
    if not path.exists():
        raise InputError(f"{path}: no such file. Name a Parquet file that encode has written.")
    try:
        rows = pq.read_table(path, columns=["id", "vector"], filters=[("id", "==", id_)])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}). Name a Parquet file that encode has written."
        ) from error
    kind = rows.schema.field("vector").type
    if not (hasattr(kind, "value_type") and pa.types.is_floating(kind.value_type)):
        raise InputError(f"{path}: its vectors are {kind}, and only floats can be read. Encode the texts as floats.")
    if not len(rows):
        raise InputError(f"{path}: no vector has the id {id_!r}. Give one that the file has.")
    return np.array(rows["vector"][0].as_py(), np.float32)
