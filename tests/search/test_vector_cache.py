"""Vectors kept on disk are those that were made, and a damaged file is made anew."""

from pathlib import Path

import numpy as np
import pytest

from anchorembed.model.embedder import Embedder
from anchorembed.search.vector_cache import VectorCache


@pytest.mark.parametrize("length", [0, 100])
def test_a_damaged_vector_file_is_made_again(embedder: Embedder, tmp_path: Path, length: int) -> None:
    cache = VectorCache(embedder, tmp_path)
    first = np.array(cache.vectors(["a", "b"], "query", ""))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:length])
    np.testing.assert_array_equal(cache.vectors(["a", "b"], "query", ""), first)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert cache.vectors([], "query", "").shape == (0, embedder.dimension)
    np.testing.assert_allclose(cache.vectors(["b", "a"], "query", ""), first[::-1], atol=1e-6)
    np.testing.assert_allclose(cache.vectors(["a", "b", ""], "query", "")[:2], first, atol=1e-6)
