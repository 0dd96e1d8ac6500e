"""What is refused before any work, and what an export is measured by."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.export.check import own_vectors, smallest_cosine
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder


def test_bfloat16_graphs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype: OpenVINO takes float32 weights, not bfloat16"):
        export(tiny_folder, tmp_path / "out", to="openvino", dtype="bfloat16")


def test_an_unknown_form_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"to: 'GGUF' is no form of an export\. Use folder, gguf, openvino, onnx"):
        export(tiny_folder, tmp_path / "out", to="GGUF")  # type: ignore[arg-type]


def test_each_stage_is_said_as_it_begins(tiny_folder: Path, tmp_path: Path, said: list[str]) -> None:
    export(tiny_folder, tmp_path / "out")
    stages = [message for message in said if message.startswith("export: ")]
    begins = [f"loading {tiny_folder}", "embedding 9 texts", f"writing {tmp_path}/out", "loading it in sentence-transf"]
    assert [stage.startswith(f"export: {begin}") for stage, begin in zip(stages, begins, strict=True)] == [True] * 4


def test_the_smallest_cosine() -> None:
    own = {"query": np.eye(2, dtype=np.float32), "document": np.eye(2, dtype=np.float32)}
    turned = {"query": np.array([[2, 0], [3, 4]], np.float32), "document": np.eye(2, dtype=np.float32)}
    assert smallest_cosine(own, lambda texts, side: turned[side], ["a", "b"]) == pytest.approx(0.8)
    turned["document"][1] = np.nan
    assert smallest_cosine(own, lambda texts, side: turned[side], ["a", "b"]) == 0


def test_vectors_of_any_length_are_measured_by_their_directions(tiny_folder: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32")
    embedder.metadata = replace(embedder.metadata, normalize=False)
    texts = ["cat", "dog"]
    assert np.linalg.norm(embedder.encode(texts), axis=1).min() > 2
    own = own_vectors(embedder, texts)
    assert smallest_cosine(own, embedder.encode, texts) == pytest.approx(1)
