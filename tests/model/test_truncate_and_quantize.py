"""Smaller vectors: hand-computed numbers, sentence-transformers' own, what comes back, and requests that cannot be."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings, truncate_embeddings

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.truncate_and_quantize import (
    VectorFormat,
    cut,
    int8_ranges,
    quantize,
    read_dimensions,
    restore,
    vector_format,
    vector_formats,
)
from anchorembed.model.vectors import Floats, unit_rows


@pytest.fixture
def vectors() -> Floats:
    return unit_rows(np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32))


def test_numbers_worked_out_by_hand() -> None:
    vectors_NH = np.array([[3, 4, 12], [0, 0, 1]], np.float32) / np.array([[13], [1]], np.float32)
    np.testing.assert_allclose(cut(vectors_NH, 2), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    # From 0 to 255 a step is 1, and 7.9 is in step 7; the constant component has no steps.
    form = VectorFormat(2, "int8", ((0.0, 5.0), (255.0, 5.0)))
    stored = quantize(np.array([[0, 5], [7.9, 5], [255, 5], [-9, 5], [999, 9]], np.float32), form)
    assert stored.dtype == np.int8
    assert stored.tolist() == [[-128, -128], [-121, -128], [127, -128], [-128, -128], [127, -124]]
    expected = unit_rows(np.array([[0.5, 5], [7.5, 5], [255.5, 5]], np.float32))
    np.testing.assert_allclose(restore(stored[:3], form), expected, rtol=1e-6)
    bits = quantize(np.array([[1, -1, 0, 2, -3, 4, 5, -6]], np.float32), VectorFormat(8, "binary"))
    assert (bits.dtype, bits.tolist()) == (np.uint8, [[0b10010110]])
    signs = np.array([[1, -1, -1, 1, -1, 1, 1, -1]]) / np.sqrt(8)
    np.testing.assert_allclose(restore(bits, VectorFormat(8, "binary")), signs, rtol=1e-6)
    assert [VectorFormat(16, name).bytes for name in ("float32", "int8", "binary")] == [64, 16, 2]


def test_they_are_those_of_sentence_transformers(vectors: Floats) -> None:
    shorter = cut(vectors, 16)
    np.testing.assert_array_equal(shorter, unit_rows(truncate_embeddings(vectors, 16)))
    ranges = int8_ranges(shorter[:150])
    ours = quantize(shorter, VectorFormat(16, "int8", ranges))
    np.testing.assert_array_equal(ours, quantize_embeddings(shorter, "int8", ranges=np.array(ranges)))
    np.testing.assert_array_equal(
        ours, quantize_embeddings(shorter, "int8", calibration_embeddings=np.array(shorter[:150]))
    )
    packed = quantize(shorter, VectorFormat(16, "binary"))
    np.testing.assert_array_equal(packed, quantize_embeddings(shorter, "ubinary"))
    np.testing.assert_array_equal(quantize(shorter, VectorFormat(16)), quantize_embeddings(shorter, "float32"))


def test_what_comes_back_is_near_what_was_stored(vectors: Floats) -> None:
    ranges = int8_ranges(vectors)
    assert int8_ranges(vectors[100:], int8_ranges(vectors[:100])) == ranges
    form = VectorFormat(32, "int8", ranges)
    step = np.subtract(ranges[1], ranges[0]).max() / 255
    error = np.abs(restore(quantize(vectors, form), form) - vectors).max()
    assert error < 0.6 * step, "half a step, and what scaling to length 1 adds"
    bits = VectorFormat(32, "binary")
    signs = restore(quantize(vectors, bits), bits)
    hamming = np.unpackbits(quantize(vectors[:1], bits) ^ quantize(vectors, bits), axis=1).sum(1)
    np.testing.assert_allclose(signs @ signs[0], 1 - 2 * hamming / 32, atol=1e-6)


@pytest.mark.parametrize(
    ("dimensions", "precision", "fault"),
    [
        (33, "float32", "--dimensions: 33 is above 32, the length of the model's vectors. Give a number from 1 to 32."),
        (0, "float32", "--dimensions: 0 is below 1. Give a number from 1 to 32."),
        (12, "binary", "--dimensions: 12 is no multiple of 8.* Give 8."),
        (3, "binary", "--dimensions: 3 is no multiple of 8.* Give 8."),
        (None, "int9", "--precision: 'int9' is unknown. Did you mean 'int8'. Use float32, int8, binary."),
    ],
)
def test_a_request_that_cannot_be_is_one_message(dimensions: int | None, precision: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        vector_format(32, dimensions, precision)


def test_faults_of_the_caller_are_named() -> None:
    with pytest.raises(InputError, match="not whole numbers"):
        read_dimensions("16,x")
    with pytest.raises(InputError, match=r"ranges: \(2, 2\) numbers, not 2 x 3"):
        vector_format(3, None, "int8", ((0, 0), (1, 1)))
    with pytest.raises(InputError, match="int8 needs the ranges"):
        quantize(np.zeros((1, 2), np.float32), VectorFormat(2, "int8"))
    for precision in ("int8", "binary"):
        with pytest.raises(InputError, match="not finite"):
            quantize(np.full((1, 8), np.nan, np.float32), vector_format(8, None, precision, ((0,) * 8, (1,) * 8)))


def test_full_vectors_come_first_and_nothing_twice() -> None:
    assert read_dimensions("") == []
    assert [str(form) for form in vector_formats(32, read_dimensions("32, 16"), ["float32", "binary"])] == [
        "32d-float32",
        "32d-binary",
        "16d-float32",
        "16d-binary",
    ]
    assert vector_formats(32, [], []) == [VectorFormat(32)]


def test_an_embedder_gives_them(embedder: Embedder, tmp_path: Path) -> None:
    texts = ["sort a list", "open a file", "read"]
    whole = embedder.encode(texts)
    np.testing.assert_array_equal(embedder.encode(texts, dimensions=16), cut(whole, 16))
    long = embedder.encode(texts, normalize=False)
    np.testing.assert_array_equal(embedder.encode(texts, normalize=False, dimensions=16), long[:, :16])
    ranges = int8_ranges(cut(whole, 16))
    small = embedder.encode(texts, dimensions=16, precision="int8", ranges=ranges)
    np.testing.assert_array_equal(small, quantize(cut(whole, 16), VectorFormat(16, "int8", ranges)))
    assert embedder.encode([], precision="binary").shape == (0, 4)
    with pytest.raises(InputError, match="int8 needs the ranges"):
        embedder.encode(texts, precision="int8")
