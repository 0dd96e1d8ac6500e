"""A GGUF file gives our vectors in llama.cpp to who sends what prompts.json says; what it cannot hold is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from anchorembed.errors import InputError
from anchorembed.export.faults import Fault
from anchorembed.export.run import export
from anchorembed.export.verify import verify
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import load_tokenizer, quiet
from anchorembed.model.tokens import Lengths
from pages import blocks
from tiny import tiny_model

TEXTS = ["sort", "", "文字 списки"]
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
    prompts = json.loads((tmp_path / "out" / "prompts.json").read_text(encoding="utf-8"))
    assert (prompts["document"], prompts["suffix"], prompts["max_tokens"]) == ("<|im_start|>user\n", "", 128)

    (code,) = (code for code in blocks("docs/serving.md", "py") if "xllamacpp" in code)
    there: dict[str, Any] = {}
    exec(code.replace('"OUT"', repr(str(tmp_path / "out"))).replace("8080", "0").replace("input", "print"), there)  # noqa: S102 - the page's own code
    url = capfd.readouterr().out.split()[0]
    assert url == there["server"].listening_address
    with_them = verify(trained, url, prompts=tmp_path / "out" / "prompts.json", skip=["over-long"])
    assert {cause.what for cause in with_them.causes} == {Fault.ONE_TEXT}
    same = {probe.cosine > 0.9999 for probe in with_them.probes if probe.name not in ("special tokens", "space")}
    assert same == {True}
    without = verify(trained, url, skip=["over-long", "special tokens"])
    assert [cause.what for cause in without.causes] == [Fault.NO_HEADER]


@pytest.mark.default_model
def test_what_llama_cpp_computes_otherwise_is_not_kept(tmp_path: Path) -> None:
    """llama.cpp runs Mistral without its sliding window."""
    with pytest.raises(InputError, match="differs from the model"):
        export(with_known_tokenizer(tmp_path, "mistral"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.default_model
def test_weights_may_have_16_bits(tmp_path: Path) -> None:
    """Of the default model's architecture and tokenizer; read here again, too."""
    trained = with_known_tokenizer(tmp_path, "llama")
    assert export(trained, tmp_path / "out", to="gguf", dtype="bfloat16") > 0.99
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2", "the default model does not split digits"
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    assert "BF16" in types
    moved = (tmp_path / "out" / "model.gguf").rename(tmp_path / "renamed.gguf")
    own, read = (Embedder.load(name, precision="float32") for name in (trained, moved))
    assert replace(read.metadata, history={}) == replace(own.metadata, history={})
    for side in ("query", "document"):
        assert (read.encode(TEXTS, side=side) * own.encode(TEXTS, side=side)).sum(axis=1).min() > 0.99
