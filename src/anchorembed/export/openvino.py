"""An OpenVINO graph beside the tokenizer and settings of a sentence-transformers folder, read again by OpenVINO."""

from pathlib import Path

import numpy as np
import openvino

from anchorembed.errors import InputError, first_line
from anchorembed.export.check import Dtype, Encode, Form
from anchorembed.export.graph import INPUTS, OUTPUTS, by_graph, silent, trace, write_settings_only
from anchorembed.model.embedder import Embedder

_FILE = Path("openvino", "openvino_model.xml")


def write(embedder: Embedder, folder: Path, dtype: Dtype) -> None:
    """Write ``openvino/openvino_model.xml``, its weights in the ``.bin`` beside it, and the settings; float32 only.

    Raises:
        InputError: if OpenVINO does not know an operation of the model.
    """
    write_settings_only(embedder, folder)
    program, _ = trace(embedder)
    try:
        with silent():
            model = openvino.convert_model(program)
    except Exception as error:  # its conversion errors have no public class
        raise InputError(
            f"--to openvino: OpenVINO cannot convert a {embedder.backbone.name!r} model: {first_line(error)} "
            "Use --to onnx or folder."
        ) from error
    for port, name in zip((*model.inputs, *model.outputs), (*INPUTS, *OUTPUTS), strict=True):
        port.set_names({name})
    openvino.save_model(model, folder / _FILE, compress_to_fp16=False)


def read(folder: Path) -> Encode:
    """Open the graph in OpenVINO, on the CPU, with products in float32: some CPUs take bfloat16 by default."""
    compiled = openvino.compile_model(folder / _FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return by_graph(folder, lambda ids, mask: np.asarray(compiled([ids, mask])[OUTPUTS[1]]))


FORM = Form("OpenVINO", write, read, {"float32": 0.9999})
