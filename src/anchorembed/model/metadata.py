"""A saved model's ``anchorembed.json``: template, length limits, prompts, and what made the weights.

It is read from a folder or the hub (`find_metadata`). For other models it is derived from their own files (`describe`).
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from anchorembed.errors import InputError
from anchorembed.model.load import absolute_name, file_beside, text_inside
from anchorembed.model.positions import default_lengths
from anchorembed.model.sentence_transformers_settings import EmbedderSettings, own_template
from anchorembed.model.template import Prompts, Template, derive_template, instruct
from anchorembed.model.tokens import Lengths

METADATA = "anchorembed.json"
GGUF_KEY = "anchorembed.metadata"  # its text in a GGUF file
GGUF_FILE, GGUF_PROMPTS = "model.gguf", "prompts.json"  # of an export for llama.cpp, with METADATA in the same folder


@dataclass(frozen=True, slots=True)
class Metadata:
    """What ``anchorembed.json`` says of a model.

    Attributes:
        template: tokens around each text.
        lengths: most tokens of a query and of a document.
        prompts: before queries and documents.
        normalize: whether its vectors have length 1, unless a caller asks otherwise.
        history: what made its weights.
    """

    template: Template
    lengths: Lengths
    prompts: Prompts = field(default_factory=Prompts)
    normalize: bool = True
    history: dict[str, object] = field(default_factory=dict)

    @property
    def stages(self) -> list[dict[str, object]]:
        """The record of each stage that trained the model, in order."""
        earlier = cast("list[dict[str, object]]", self.history.get("before", []))
        last = {key: value for key, value in self.history.items() if key in ("plan", "data")}
        return [*earlier, last] if last else earlier


def find_metadata(name: str) -> Metadata | None:
    """The metadata of a model that was saved by `Embedder.save`, in a folder or on the hub; None for other models.

    A ``.gguf`` file has them inside, or else those of its folder if that is an export.
    """
    file = Path(name)
    if file.suffix == ".gguf" and (text := text_inside(name, GGUF_KEY)):
        return _parse(text, file)
    if file.name == GGUF_FILE and (file.parent / GGUF_PROMPTS).is_file():
        return read_metadata(file.parent)
    path = file_beside(name, METADATA)
    return read_metadata(path.parent) if path else None


def saved_sha256(folder: Path) -> str:
    """SHA-256 of a model folder's weights, from its ``anchorembed.json``; empty if it has no such file."""
    if read_metadata(folder) is None:
        return ""
    return str(json.loads((folder / METADATA).read_text(encoding="utf-8")).get("weights_sha256", ""))


def read_metadata(folder: Path) -> Metadata | None:
    """Read a model folder's ``anchorembed.json``, or return None if it has no such file.

    Raises:
        InputError: if the file is damaged.
    """
    path = folder / METADATA
    return _parse(path.read_bytes(), path) if path.is_file() else None


def _parse(content: str | bytes, path: Path) -> Metadata:
    try:
        record = json.loads(content)
        return Metadata(
            template=Template(**record["template"]),
            lengths=Lengths(**record["lengths"]),
            prompts=Prompts(**record["prompts"]) if "prompts" in record else Prompts(instruct(record["instruction"])),
            normalize=bool(record.get("normalize", True)),
            history=record["history"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). Export or train the model again.") from error


def describe(
    name: str,
    settings: Metadata | EmbedderSettings | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None = None,
) -> Metadata:
    """A model's metadata: from what `find_metadata` or else `find_embedder_settings` gives, or from its chat template.

    A given template is taken instead of the model's own.

    Raises:
        InputError: if the model's template cannot be found out.
    """
    if isinstance(settings, Metadata):
        return replace(settings, template=template or settings.template)
    history: dict[str, object] = {"base": absolute_name(name)}
    if settings is None:
        return Metadata(template or derive_template(tokenizer), default_lengths(config), history=history)
    lengths = settings.lengths(config, tokenizer)
    return Metadata(template or own_template(name, tokenizer), lengths, settings.prompts, settings.normalize, history)
