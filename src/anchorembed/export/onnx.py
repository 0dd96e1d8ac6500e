"""An ONNX graph beside the tokenizer and settings of a sentence-transformers folder, read again by ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401 - torch.onnx needs it; a missing package is reported here
import torch

from anchorembed.export.check import Dtype, Encode, Form
from anchorembed.export.graph import INPUTS, OUTPUTS, by_graph, silent, trace, write_settings_only
from anchorembed.model.embedder import Embedder

_FILE = Path("onnx", "model.onnx")


def write(embedder: Embedder, folder: Path, dtype: Dtype) -> None:
    """Write ``onnx/model.onnx``, with its weights in ``model.onnx.data`` beside it, and the settings; float32 only."""
    write_settings_only(embedder, folder)
    program, example = trace(embedder)
    (folder / _FILE).parent.mkdir()
    with silent():
        torch.onnx.export(program, example, folder / _FILE, input_names=INPUTS, output_names=OUTPUTS, verbose=False)


def read(folder: Path) -> Encode:
    """Open the graph in ONNX Runtime, on the CPU."""
    session = onnxruntime.InferenceSession(folder / _FILE, providers=["CPUExecutionProvider"])
    return by_graph(
        folder, lambda ids, mask: np.asarray(session.run([OUTPUTS[1]], dict(zip(INPUTS, (ids, mask), strict=True)))[0])
    )


FORM = Form("ONNX Runtime", write, read, {"float32": 0.9999})
