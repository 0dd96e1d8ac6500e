"""ONNX and OpenVINO graphs give our vectors, padded or not, and the code that the guide shows runs them."""

import re
from pathlib import Path

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.export import graph
from anchorembed.export.run import To, export, find_form
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from tiny import save_tiny

TEXTS = ["sort", "", "  ", "sort the list " * 80, "文字 списки", "open a file", "sort</s> and <s>", "</s>"]
GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with full and sliding attention, with rotary settings of their own."""
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny(folder / "base", "gemma3_text")
    embedder = Embedder.load(base, precision="float32", lengths=Lengths(48, 48), instruction="find code")
    embedder.save(folder / "trained")
    return folder / "trained"


def guide(engine: str, folder: Path) -> np.ndarray:
    """Vectors by the guide's code for an engine, of an exported folder."""
    blocks = re.findall(r"^```py\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (reading,) = [block for block in blocks if "Tokenizer.from_file" in block]
    (running,) = [block for block in blocks if block.startswith(f"import {engine} ")]
    names: dict[str, np.ndarray] = {}
    exec((reading + running).replace("OUT/", f"{folder}/"), names)  # noqa: S102 - the guide's own code
    return names["vectors"]


@pytest.mark.parametrize(("to", "engine"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_graph_has_our_vectors(
    to: To, engine: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    native = Embedder.load(trained, precision="float32")
    capfd.readouterr()
    assert export(trained, tmp_path / "out", to=to) > 0.9999
    assert capfd.readouterr() == ("", ""), "no bar or warning of a library"
    encode = find_form(to).read(tmp_path / "out")
    for side in ("query", "document"):
        np.testing.assert_allclose(encode(TEXTS, side), native.encode(TEXTS, side=side), atol=1e-4)
    shown = native.encode(["How do I sort a list?", "cat"], side="query")
    np.testing.assert_allclose(guide(engine, tmp_path / "out"), shown, atol=1e-4)


def test_a_graph_of_other_positions_is_not_kept(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = graph.SentenceModel.forward
    broken = lambda self, input_ids, attention_mask: run(self, input_ids, attention_mask.flip(1))  # noqa: E731
    monkeypatch.setattr(graph.SentenceModel, "forward", broken)
    with pytest.raises(InputError, match="differs from the model"):
        export(trained, tmp_path / "out", to="openvino")
    assert not (tmp_path / "out").exists()


def test_what_torch_cannot_trace_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph.SentenceModel, "forward", lambda self, input_ids, attention_mask: input_ids.tolist())
    with pytest.raises(InputError, match=r"torch cannot trace a 'gemma3_text' model: .*Use --to folder"):
        export(trained, tmp_path / "out", to="onnx")


def test_its_card_says_what_runs_it(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out", to="onnx")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: onnx" in card
    assert "`onnx/model.onnx` is a graph for ONNX Runtime" in card
    assert "at most 48 of them" in card
