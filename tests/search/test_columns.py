"""Encoded files say how their vectors are stored, and others can be stored like them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anchorembed.api import encode
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import VectorFormat, cut, int8_ranges, quantize
from anchorembed.search.columns import matrix, read_made_by
from anchorembed.system.files import write_jsonl
from tiny import save_tiny

TEXTS = [f"sort list {number} of {number % 7} rows" for number in range(120)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "texts.jsonl", [{"_id": f"t{number}", "text": text} for number, text in enumerate(TEXTS)])
    return tmp_path / "texts.jsonl"


def read(path: Path) -> Any:
    table = pq.read_table(path)
    return matrix(table["vector"].combine_chunks()), table["vector"].type


@pytest.mark.parametrize(
    ("precision", "dimensions", "column"),
    [(None, 16, pa.float32()), ("int8", 16, pa.int8()), ("int8", None, pa.int8()), ("binary", 16, pa.uint8())],
)
def test_a_file_of_smaller_vectors(
    tiny_folder: Path, texts: Path, tmp_path: Path, precision: Any, dimensions: int | None, column: pa.DataType
) -> None:
    out = tmp_path / "vectors.parquet"
    assert encode(tiny_folder, texts, out, dimensions=dimensions, precision=precision) == len(TEXTS)
    embedder = Embedder.load(tiny_folder)
    expected = cut(embedder.encode(TEXTS), dimensions or 32)
    stored, kind = read(out)
    made_by = read_made_by(out)
    form = VectorFormat(
        dimensions or 32, precision or "float32", int8_ranges(expected) if precision == "int8" else None
    )
    assert (made_by.model, made_by.form) == (embedder.fingerprint, form)
    assert kind == pa.list_(column, form.bytes // column.byte_width)
    np.testing.assert_array_equal(stored, quantize(expected, form))
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.jsonl", "vectors.parquet", "cache"}


def test_queries_are_stored_like_documents(tiny_folder: Path, texts: Path, tmp_path: Path) -> None:
    documents, queries = tmp_path / "documents.parquet", tmp_path / "queries.parquet"
    encode(tiny_folder, texts, documents, dimensions=16, precision="int8")
    (tmp_path / "queries.txt").write_text("open a file\nlist 3\n", encoding="utf-8")
    encode(tiny_folder, tmp_path / "queries.txt", queries, side="query", like=documents)
    form = read_made_by(documents).form
    assert read_made_by(queries).form == form
    whole = cut(Embedder.load(tiny_folder).encode(["open a file", "list 3"], "query"), 16)
    np.testing.assert_array_equal(read(queries)[0], quantize(whole, form))
    (tmp_path / "parts").mkdir()
    documents.rename(tmp_path / "parts" / "part-000000.parquet")
    assert read_made_by(tmp_path / "parts").form == form


def test_what_cannot_be_like_is_one_message(tiny_folder: Path, texts: Path, tmp_path: Path) -> None:
    out, like = tmp_path / "out.parquet", tmp_path / "like.parquet"
    encode(tiny_folder, texts, like, precision="binary")
    with pytest.raises(InputError, match="says dimensions and precision"):
        encode(tiny_folder, texts, out, like=like, dimensions=8)
    with pytest.raises(InputError, match="--like: its vectors were made with model"):
        encode(save_tiny(tmp_path / "other", "qwen3"), texts, out, like=like)
    pq.write_table(pa.table({"vector": [1.0]}), tmp_path / "plain.parquet")
    metadata = {"anchorembed": json.dumps({"model": "m", "dimensions": 8, "precision": "int4", "ranges": None})}
    pq.write_table(pa.table({"v": [1]}).replace_schema_metadata(metadata), tmp_path / "unknown.parquet")
    for wrong in (texts, tmp_path / "none.parquet", tmp_path, tmp_path / "plain.parquet", tmp_path / "unknown.parquet"):
        with pytest.raises(InputError, match=r"^--like: .*Give a file that encode wrote"):
            encode(tiny_folder, texts, out, like=wrong)
    assert not out.exists()


def test_ranges_of_few_texts_are_said(tiny_folder: Path, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "few.txt").write_text("read\nwrite\n", encoding="utf-8")
    encode(tiny_folder, tmp_path / "few.txt", tmp_path / "few.parquet", precision="int8")
    assert said == ["int8: the ranges are those of 2 texts; vectors encoded with --like are clipped to them"]
    (tmp_path / "one.txt").write_text("read\n", encoding="utf-8")
    with pytest.raises(InputError, match="--precision: int8 takes its ranges from the texts, and there is one"):
        encode(tiny_folder, tmp_path / "one.txt", tmp_path / "one.parquet", precision="int8")
    encode(tiny_folder, tmp_path / "one.txt", tmp_path / "one.parquet", like=tmp_path / "few.parquet")
    for fault in ({"dimensions": 33}, {"dimensions": 12, "precision": "binary"}):
        with pytest.raises(InputError, match="--dimensions"):
            encode(tiny_folder, tmp_path / "few.txt", tmp_path / "x.parquet", **fault)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.glob("*.parquet")} == {"few.parquet", "one.parquet"}


def test_shorter_vectors_of_a_model_that_does_not_normalise_are_as_encode_gives_them(tmp_path: Path) -> None:
    embedder = Embedder.load(save_tiny(tmp_path / "base"), precision="float32")
    embedder.metadata = replace(embedder.metadata, normalize=False)
    embedder.save(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    encode(tmp_path / "model", tmp_path / "texts.txt", tmp_path / "out.parquet", dimensions=16)
    vectors = matrix(pq.read_table(tmp_path / "out.parquet")["vector"].combine_chunks())
    np.testing.assert_allclose(vectors, Embedder.load(tmp_path / "model").encode(["a", "b"], dimensions=16), atol=1e-5)
