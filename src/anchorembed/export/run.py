"""Export a model in a form that other software loads; the export is reloaded there and compared before it is kept."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from anchorembed.errors import InputError, extra
from anchorembed.export.card import RESULTS, published, write_card
from anchorembed.export.check import Dtype, Form, own_vectors, smallest_cosine
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.system.files import whole_folder

To = Literal["folder", "gguf", "openvino", "onnx"]  # also names of modules here
EXTRAS = {"gguf": "llamacpp", "openvino": "openvino", "onnx": "onnx"}
_log = logging.getLogger(__name__)


def export(
    name: str | Path, target: str | Path, *, to: To = "folder", dtype: Dtype = "float32", title: str = ""
) -> float:
    """Write a model for other software, reload it there, and compare its vectors with ours in float32.

    Args:
        name: as in `Embedder.load`.
        target: folder to write; it must not exist.
        to: ``folder`` is sentence-transformers' form, which most servers read.
        dtype: of the weights.
        title: the model's name in its card; by default the folder's name.

    Returns:
        The smallest cosine between our vector of a text and the export's, over test texts as queries and documents.

    Raises:
        InputError: if the target exists, the form cannot hold the model, or a cosine is too small; then nothing is
            kept.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"{target}: exists already. Name a new folder, or remove it.")
    form = find_form(to)
    if dtype not in form.limits:
        raise InputError(f"--dtype: {form.engine} takes {', '.join(form.limits)} weights, not {dtype}.")
    _log.info("export: loading %s", name)
    embedder = _with_one_limit(Embedder.load(name, precision="float32", device="cpu"))
    texts = form.texts if form.cuts else _within_limit(embedder, form.texts)
    _log.info("export: embedding %d texts, to compare with", len(texts))
    vectors = own_vectors(embedder, texts)
    embedder.metadata = published(embedder.metadata)
    _log.info("export: writing %s", target)
    with whole_folder(target, new=True) as folder:
        form.write(embedder, folder, dtype)
        if (results := Path(name) / RESULTS).is_file():
            (folder / RESULTS).write_bytes(results.read_bytes())
        write_card(folder, title or target.name, embedder.dimension, to)
        _log.info("export: loading it in %s, and embedding these texts", form.engine)
        smallest = smallest_cosine(vectors, form.read(folder), texts)
        if not smallest > form.limits[dtype]:
            raise InputError(
                f"{target}: the reloaded export differs from the model: smallest cosine {smallest:.6f}, which must be "
                f"above {form.limits[dtype]}. Not kept."
            )
    return smallest


def find_form(to: str) -> Form:
    """The export form of a name; raises InputError if it is unknown or its extra is not installed."""
    if to not in get_args(To):
        raise InputError(f"to: {to!r} is no form of an export. Use {', '.join(get_args(To))}.")
    with extra(EXTRAS.get(to, "")):
        form: Form = import_module(f"anchorembed.export.{to}").FORM
    return form


def _within_limit(embedder: Embedder, texts: Sequence[str]) -> list[str]:
    """The texts that fit the limit, even with the longer prompt."""
    prefix = max(embedder.metadata.prompts.query, embedder.metadata.prompts.document, key=len)
    counts = embedder.pairs.count([prefix + text for text in texts])
    return [text for text, count in zip(texts, counts, strict=True) if count <= embedder.metadata.lengths.query]


def _with_one_limit(embedder: Embedder) -> Embedder:
    """The embedder with the longer limit for both sides: only sentence-transformers 6 has a limit for each side."""
    lengths = embedder.metadata.lengths
    limit = max(lengths.query, lengths.document)
    if lengths == Lengths(limit, limit):
        return embedder
    _log.warning(
        "the export cuts queries and documents at %d tokens; the model cuts queries at %d and documents at %d. "
        "Vectors of longer texts differ.",
        limit,
        lengths.query,
        lengths.document,
    )
    metadata = replace(embedder.metadata, lengths=Lengths(limit, limit))
    return Embedder(embedder.backbone, embedder.tokenizer, metadata, embedder.dtype).eval()
