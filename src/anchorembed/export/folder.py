"""Export as a sentence-transformers folder, which is loaded and compared with ours before it is kept.

The folder holds the merged decoder, the baked tokenizer, last-token pooling, normalisation, both prompts and both
length limits: ``SentenceTransformer(folder)`` gives our vectors without this package.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from anchorembed.errors import InputError
from anchorembed.export.card import write_card
from anchorembed.model.embedder import METADATA, Embedder
from anchorembed.model.load import quiet
from anchorembed.model.vectors import Side
from anchorembed.system.files import whole_folder

SMALLEST_COSINE = 0.9999  # between our vectors and those of an export that is kept
_TEXTS = (
    "cat",
    ".",
    "How do I read a file line by line?",
    "Die Würde des Menschen ist unantastbar.",
    "Special tokens are text here: </s> <|im_end|> <|endoftext|> <eos>",
    "向量检索将文本映射到同一空间。 البحث الدلالي 🙂",
    "A sentence that says one thing after another. " * 400,
)


def export(name: str | Path, target: str | Path) -> float:
    """Write a sentence-transformers folder and compare its vectors with ours, both in float32.

    Args:
        name: as in `Embedder.load`.
        target: folder to write; it must not exist.

    Returns:
        The smallest cosine between our vector of a text and the export's, over seven texts as queries and documents.

    Raises:
        InputError: if the target exists, or a cosine is not above 0.9999; then nothing is kept.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"{target}: exists already. Name a new folder, or remove it.")
    embedder = Embedder.load(name, precision="float32", device="cpu")
    with whole_folder(target) as folder:
        _write(embedder, folder, target.name)
        smallest = compare(embedder, folder)
        if not smallest > SMALLEST_COSINE:
            raise InputError(f"{target}: the reloaded export differs from the model (cosine {smallest:.6f}). Not kept.")
    return smallest


def compare(embedder: Embedder, folder: Path) -> float:
    """Smallest cosine between our vectors and those of an exported folder, over short, long and unusual texts."""
    with quiet():
        exported = SentenceTransformer(str(folder), device="cpu")
    encoders = {"query": exported.encode_query, "document": exported.encode_document}
    sides: tuple[Side, Side] = ("query", "document")
    cosines = [
        (embedder.encode(_TEXTS, side=side) * np.asarray(encoders[side](list(_TEXTS)))).sum(axis=1).min()
        for side in sides
    ]
    return float(min(cosines))


def _write(embedder: Embedder, folder: Path, title: str) -> None:
    metadata = embedder.metadata
    with tempfile.TemporaryDirectory(dir=folder) as native, quiet():
        embedder.save(Path(native))
        transformer = Transformer(
            native,
            query_length=metadata.lengths.query,
            document_length=metadata.lengths.document,
            max_seq_length=max(metadata.lengths.query, metadata.lengths.document),
        )
        last = [Normalize()] if metadata.normalize else []
        model = SentenceTransformer(
            modules=[transformer, Pooling(embedder.dimension, "lasttoken"), *last],
            prompts=asdict(metadata.prompts),
            device="cpu",
        )
        model.save(str(folder), create_model_card=False)
        if embedder.backbone.has_own_head:
            _keep_head(Path(native), folder)
        (Path(native) / METADATA).replace(folder / METADATA)
        write_card(folder, title, exported=True)


def _keep_head(native: Path, folder: Path) -> None:
    """Replace weights and config by those of the whole language model: sentence-transformers saves no output head."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for path in (*native.glob("*.safetensors*"), native / "config.json"):
        path.replace(folder / path.name)
