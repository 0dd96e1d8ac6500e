"""Embedder: a decoder and its baked tokenizer, which embed a text as the decoder's final state at the text's EOS.

``forward(PackedBatch) -> [N, H]`` is all that training needs; ``encode(texts)`` is all that users need. A saved folder
is an ordinary transformers folder with one more file, ``anchorembed.json``.

Axes: N texts, H hidden size, T packed tokens, V vocabulary.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anchorembed.errors import InputError, installed_by, memory_ended
from anchorembed.model.adapters import merge_lora
from anchorembed.model.backbone import Backbone, forward_settings, weights_sha256
from anchorembed.model.check_packed_loss import check_reproduced, measure_scales, own_logits
from anchorembed.model.choose_attention import use_varlen
from anchorembed.model.intact import check_vocabulary
from anchorembed.model.load import load_model, quiet
from anchorembed.model.metadata import METADATA, Metadata, describe, find_metadata
from anchorembed.model.packing import PackedBatch, by_length, pack
from anchorembed.model.positions import check_lengths
from anchorembed.model.sentence_transformers_settings import EmbedderSettings, check_causal, find_embedder_settings
from anchorembed.model.template import Template, bake, instruct
from anchorembed.model.tokens import Lengths, PairTokenizer
from anchorembed.model.transformers4 import add_transformers4_settings
from anchorembed.model.truncate_and_quantize import Ranges, Stored, StoredPrecision, cut, quantize, vector_format
from anchorembed.model.vectors import Floats, Side, check_finite, unit_rows
from anchorembed.system.device import Precision, Weights, autocast, compute_dtype, find_device, keep_memory
from anchorembed.system.files import hash_texts
from anchorembed.system.processes import processes

if TYPE_CHECKING:  # these need packages that no extra installs
    from anchorembed.model.langchain import LangChainEmbeddings
    from anchorembed.model.llamaindex import LlamaIndexEmbedding

_log = logging.getLogger(__name__)

_WINDOW = 4096  # texts read ahead, so that texts of like length share a batch
_WINDOW_CHARACTERS = 2**26  # at which reading ahead ends, whatever the number of texts
_RULES = 3  # part of the fingerprint; increase it with every change by which equal weights and texts give other vectors
_TOKENS, _TOKENS_ON_GPU = 8192, 65536  # computed at once when encoding


class Embedder(nn.Module):
    """Turns texts into vectors: the decoder's final state at each text's EOS. Threads may share it to encode."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerFast,
        metadata: Metadata,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.metadata = metadata
        self.pairs = PairTokenizer(tokenizer, metadata.lengths)
        self.dtype = dtype  # of matrix products

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        precision: Precision = "auto",
        weights: Weights = "float32",
        device: str = "auto",
        template: Template | None = None,
        lengths: Lengths | None = None,
        instruction: str | None = None,
    ) -> "Embedder":
        """Load a trained folder, or any decoder as an untrained embedder.

        Args:
            name: a folder, a hub id, a ``.gguf`` file, or ``smollm2-135m``.
            precision: of matrix products; ``auto`` takes bfloat16 where the hardware has it.
            weights: how the model's weights are stored; ``bfloat16`` takes half the memory of ``float32``, and
                ``nf4`` an eighth. Products are then bfloat16, and the model is saved in bfloat16.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` takes no Apple GPU, which is untested.
            template: by default the folder's, or derived from the tokenizer.
            lengths: by default the folder's, or 512 tokens a side where the model takes as many.
            instruction: task put before queries; by default the folder's, or none.

        Raises:
            InputError: if the model cannot be loaded, is no causal decoder, gives other outputs on packed tokens, or
                takes no texts of these lengths.
        """
        keep_memory()
        name = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
        torch_device = find_device(device)
        dtype = compute_dtype(precision, torch_device, weights)
        settings = find_metadata(name) or find_embedder_settings(name)
        model, tokenizer = load_model(name, weights, torch_device, tie_head=isinstance(settings, EmbedderSettings))
        check_causal(name, model.config)
        own_TV = own_logits(model, name)
        backbone = Backbone(model)
        backbone.input_scale, backbone.logit_scale = measure_scales(backbone, own_TV, name)
        check_reproduced(backbone, own_TV, name)
        use_varlen(backbone, dtype)
        metadata = describe(name, settings, model.config, tokenizer, template)
        if isinstance(settings, EmbedderSettings) and lengths not in (None, metadata.lengths):
            own = f"{metadata.lengths.query} tokens of a query and {metadata.lengths.document} of a document"
            _log.info("%s: its own limit is %s; this run takes %s", name, own, lengths)
        prompts = metadata.prompts.of_pairs(instruction, symmetric=False)
        metadata = replace(metadata, lengths=lengths or metadata.lengths, prompts=prompts)
        check_lengths(name, model.config, metadata.lengths)
        baked = bake(tokenizer, metadata.template)
        check_vocabulary(name, model, baked)
        return cls(backbone, baked, metadata, dtype).eval()

    def __repr__(self) -> str:
        """Return one line, where `nn.Module` has one for each module."""
        name, limits = self.backbone.model.name_or_path, self.metadata.lengths
        limit = f"queries up to {limits.query} tokens, documents up to {limits.document}"
        return f"Embedder({name!r}, {self.dimension} dimensions, {limit}, on {self.device})"

    @property
    def dimension(self) -> int:
        """H, the length of an embedding."""
        return self.backbone.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the names and values of all weights, computed once, at the first use."""
        return weights_sha256(self.backbone.model)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides vectors: weights, config, tokenizer, lengths, prompts, scaling, and `_RULES`."""
        settings = [
            _RULES,
            self.weights_sha256,
            forward_settings(self.backbone.model.config),
            self.pairs.rules(),
            asdict(self.metadata.lengths),
            asdict(self.metadata.prompts),
            self.metadata.normalize,
        ]
        return hash_texts([json.dumps(settings, sort_keys=True)])

    def forward(self, batch: PackedBatch) -> Tensor:
        """Embed packed templated texts: [N, H], float32, not normalised."""
        with autocast(self.backbone.device, self.dtype):
            states_TH = self.backbone.states(self.backbone.embed(batch.tokens), batch)
        return states_TH[batch.anchors].float()

    def encode(
        self,
        texts: Iterable[str],
        side: Side = "document",
        instruction: str | None = None,
        normalize: bool | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        dimensions: int | None = None,
        precision: StoredPrecision = "float32",
        ranges: Ranges | None = None,
    ) -> Stored:
        """Embed texts, in order: float32 [N, D], int8 [N, D], or uint8 [N, D / 8]; D is H by default.

        Args:
            texts: any iterable of strings; a generator is read 4,096 texts or 64 million characters ahead.
            side: ``query`` or ``document``; they differ in length limit and in the default instruction.
            instruction: a task to put before each text; by default the model's own prompt of that side.
            normalize: scale to unit length; by default as the model's settings say, which is True for most.
            progress: called with the number of texts done since the last call.
            dimensions: keep the first so many components; ``normalize`` is of these.
            precision: of the vectors returned, as in `truncate_and_quantize`: ``float32``, ``int8`` or ``binary``.
            ranges: for int8, `int8_ranges` of the documents' vectors, the same for documents and queries.

        Raises:
            InputError: if ``texts`` is one string or an item is not a string, ``side`` is unknown, an instruction
                leaves no room for text, or ``dimensions``, ``precision`` or ``ranges`` do not fit the model.
        """
        form = vector_format(self.dimension, dimensions, precision, ranges)
        windows = self.stream(texts, side, instruction, normalize, progress)
        parts = [quantize(cut(window, form.dimensions, self._scales(normalize)), form) for window in windows]
        return np.concatenate(parts) if parts else quantize(np.zeros((0, form.dimensions), np.float32), form)

    def stream(
        self,
        texts: Iterable[str],
        side: Side = "document",
        instruction: str | None = None,
        normalize: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Embed texts as `encode` does, yielding the vectors of 4,096 texts, or 64 million characters, at a time."""
        if side not in ("query", "document"):
            raise InputError(f"encode: side is {side!r}. Use 'query' or 'document'.")
        prompt = self.metadata.prompts.query if side == "query" else self.metadata.prompts.document
        prefix = prompt if instruction is None else instruct(instruction)
        limit = self.metadata.lengths.query if side == "query" else self.metadata.lengths.document
        self.pairs.check_room(prefix, limit)
        for window in _windows(_checked(texts)):
            sequences = self.pairs.templated([prefix + text for text in window], limit)
            vectors = self.encode_tokens(sequences, progress)
            check_finite(vectors.numpy())
            yield torch.nn.functional.normalize(vectors, dim=-1).numpy() if self._scales(normalize) else vectors.numpy()

    # --- Methods that sentence-transformers and LangChain have ---

    def encode_query(self, texts: str | Sequence[str], batch_size: int | None = None) -> Floats:
        """Embed queries, as `SentenceTransformer.encode_query` does: float32 [N, H], or [H] of one string.

        Args:
            texts: one or several.
            batch_size: most texts computed at once; by default as many as the token budget of the device holds.
        """
        return self._encode_side(texts, "query", batch_size)

    def encode_document(self, texts: str | Sequence[str], batch_size: int | None = None) -> Floats:
        """Embed documents, as `encode_query` does queries."""
        return self._encode_side(texts, "document", batch_size)

    def similarity(self, first_NH: Floats, second_MH: Floats) -> Floats:
        """Cosines of all pairs of vectors, [N, M]."""
        return np.asarray(unit_rows(np.atleast_2d(first_NH)) @ unit_rows(np.atleast_2d(second_MH)).T)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, as a method of LangChain's `Embeddings`."""
        return [float(value) for value in self.encode_query(text)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, as a method of LangChain's `Embeddings`."""
        vectors: list[list[float]] = self.encode_document(texts).tolist()
        return vectors

    def for_langchain(self) -> "LangChainEmbeddings":
        """This embedder as LangChain's ``Embeddings``; raises InputError where langchain-core is not installed."""
        with installed_by("langchain-core"):
            from anchorembed.model.langchain import LangChainEmbeddings  # noqa: PLC0415 - not one of our packages
        return LangChainEmbeddings(self)

    def for_llamaindex(self) -> "LlamaIndexEmbedding":
        """This embedder as LlamaIndex's ``BaseEmbedding``; raises InputError where it is not installed."""
        with installed_by("llama-index-core"):
            from anchorembed.model.llamaindex import LlamaIndexEmbedding  # noqa: PLC0415 - not one of our packages
        return LlamaIndexEmbedding(self)

    def _encode_side(self, texts: str | Sequence[str], side: Side, batch_size: int | None) -> Floats:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is below 1. Compute at least one text at once.")
        listed = list(_checked([texts] if isinstance(texts, str) else texts))
        size = batch_size or len(listed) or 1
        parts = [self.encode(listed[start : start + size], side) for start in range(0, len(listed) or 1, size)]
        vectors_NH = np.concatenate(parts)
        return vectors_NH[0] if isinstance(texts, str) else vectors_NH

    def _scales(self, normalize: bool | None) -> bool:
        """Whether vectors are scaled to unit length, for ``normalize`` as `encode` takes it."""
        return self.metadata.normalize if normalize is None else normalize

    @torch.inference_mode()
    def encode_tokens(self, sequences: Sequence[list[int]], progress: Callable[[int], None] | None = None) -> Tensor:
        """Embed templated texts, given as token ids: [N, H] on the CPU, in the order given.

        The longest are computed first, as many at once as the token budget holds, or half as many where memory ends.
        """
        training, device = self.training, self.backbone.device
        if training:
            self.eval()
        lengths = [len(sequence) for sequence in sequences]
        order, runs = by_length(lengths, max([_TOKENS_ON_GPU if device.type == "cuda" else _TOKENS, *lengths]))
        parts = []
        try:
            for run in runs:
                parts.append(self._within_memory([sequences[i] for i in order[run.start : run.stop]]))
                if progress:
                    progress(len(run))
        finally:
            if training:
                self.train()
        vectors = torch.empty(len(sequences), self.dimension)
        if parts:
            vectors[order] = torch.cat(parts).cpu()  # the only wait for a GPU
        return vectors

    def _within_memory(self, sequences: list[list[int]]) -> Tensor:
        """Embed token ids at once: [N, H] on the model's device; by halves where memory ends."""
        try:
            vectors_NH: Tensor = self(pack(sequences).to(self.backbone.device))
            return vectors_NH
        except (RuntimeError, MemoryError) as error:
            if len(sequences) == 1 or processes() > 1 or not memory_ended(error):  # processes must run equal passes
                raise
        half = len(sequences) // 2  # outside the block above, as the error holds the failed pass's memory
        return torch.cat([self._within_memory(sequences[:half]), self._within_memory(sequences[half:])])

    def save(self, folder: str | Path, history: dict[str, object] | None = None, headless: bool = False) -> None:
        """Write a transformers folder with merged weights, the baked tokenizer and ``anchorembed.json``.

        Args:
            folder: to write to.
            history: what made the weights, added to the metadata's.
            headless: write the decoder without its output head, if the head is tied to the input vectors.
        """
        merge_lora(self.backbone)
        folder = Path(folder)
        model, backend = self.backbone.model, self.tokenizer.backend_tokenizer
        backend.no_truncation()  # which the last call may have set
        backend.no_padding()
        saved: PreTrainedModel = model
        if headless and not self.backbone.head_is_untied:
            saved = cast("PreTrainedModel", model.base_model)
        with quiet():
            saved.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        add_transformers4_settings(folder)
        record = asdict(self.metadata) | {"history": self.metadata.history | (history or {}), "format": 1}
        record["weights_sha256"] = weights_sha256(model)
        (folder / METADATA).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """Pass texts on; raise InputError with the index and type of an item that is not a string."""
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        kind = "string" if isinstance(texts, str) else type(texts).__name__
        raise InputError(f"encode: got one {kind}. Pass a list of texts.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"encode: texts[{number}] is of type {type(text).__name__}. Pass strings.")
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise InputError(f"encode: texts[{number}] has a lone surrogate, which is not Unicode text. Remove it.")
        yield text


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) == _WINDOW or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window
