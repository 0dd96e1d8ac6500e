"""A GGUF file gives our vectors in llama.cpp to who sends what prompts.json says; what it cannot hold is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import xllamacpp

from anchorembed.errors import InputError
from anchorembed.export.gguf import parameters
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import load_tokenizer, quiet
from anchorembed.model.tokens import Lengths
from tiny import tiny_model

TEXTS = ["sort", "", "sort the list " * 20, "文字 списки", "open a file"]
pytestmark = pytest.mark.slow


def with_known_tokenizer(folder: Path, name: str) -> Path:
    """A tiny model with SmolLM2's tokenizer, which llama.cpp's converter knows."""
    with quiet():
        tiny_model(name, vocabulary=49152).save_pretrained(folder / "base")
        load_tokenizer("smollm2-135m").save_pretrained(folder / "base")
    lengths = Lengths(128, 128)
    Embedder.load(folder / "base", lengths=lengths, instruction="find code").save(folder / "trained")
    return folder / "trained"


def test_an_unknown_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not know this BPE tokenizer"):
        export(tiny_folder, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.default_model
def test_llama_cpp_has_our_vectors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = with_known_tokenizer(tmp_path, "qwen3")
    capfd.readouterr()
    assert export(trained, tmp_path / "out", to="gguf") > 0.9999
    assert capfd.readouterr() == ("", ""), "no bar or warning of a library"
    server = xllamacpp.Server(parameters(tmp_path / "out"))
    prompts = json.loads((tmp_path / "out" / "prompts.json").read_text(encoding="utf-8"))
    assert (prompts["document"], prompts["suffix"], prompts["max_tokens"]) == ("<|im_start|>user\n", "", 128)

    def vectors(prefix: str) -> np.ndarray:
        answer = server.handle_embeddings({"input": [prefix + text for text in TEXTS]})
        return np.array([row["embedding"] for row in answer["data"]])

    native = Embedder.load(trained, precision="float32")
    for side in ("query", "document"):
        assert (vectors(prompts[side]) * native.encode(TEXTS, side=side)).sum(axis=1).min() > 0.9999
    assert (vectors("") * native.encode(TEXTS)).sum(axis=1).min() < 0.9, "without the header"


@pytest.mark.default_model
def test_what_llama_cpp_computes_otherwise_is_not_kept(tmp_path: Path) -> None:
    """llama.cpp runs Mistral without its sliding window."""
    with pytest.raises(InputError, match="differs from the model"):
        export(with_known_tokenizer(tmp_path, "mistral"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.default_model
def test_the_default_model(tmp_path: Path) -> None:
    assert export("smollm2-135m", tmp_path / "out", to="gguf", dtype="bfloat16") > 0.99
