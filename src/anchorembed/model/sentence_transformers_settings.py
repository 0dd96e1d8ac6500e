"""Settings of a sentence-transformers embedder: its template, prompts, length limit and normalisation.

They are kept, so that vectors equal those of sentence-transformers. Only models that pool at the last token are taken.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from anchorembed.errors import InputError
from anchorembed.model.load import file_beside
from anchorembed.model.positions import most_positions
from anchorembed.model.template import Prompts, Template, bake
from anchorembed.model.tokens import Lengths

_log = logging.getLogger(__name__)

_MODULES = ("Transformer", "Pooling", "Normalize")
_PROBES = ("sort a list", "Wie spät ist es?", "向量 🙂")  # the template must give the tokenizer's own ids of these
_ONLY = "AnchorEmbed trains causal decoders whose vector is the state of their last token."


@dataclass(frozen=True, slots=True)
class EmbedderSettings:
    """Settings of a sentence-transformers folder.

    Attributes:
        prompts: before queries and documents, as ``encode_query`` and ``encode_document`` put them.
        query_tokens: most tokens of a query, prompt included; None if the folder does not say.
        document_tokens: most tokens of a document, alike.
        normalize: whether its vectors have length 1.
    """

    prompts: Prompts
    query_tokens: int | None
    document_tokens: int | None
    normalize: bool

    def lengths(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Lengths:
        """The limit of each side: the folder's or else the tokenizer's, and at most the model's positions."""
        most, _ = most_positions(config)
        of_tokenizer = int(tokenizer.model_max_length)
        return Lengths(min(most, self.query_tokens or of_tokenizer), min(most, self.document_tokens or of_tokenizer))


def find_embedder_settings(name: str) -> EmbedderSettings | None:
    """The settings of a sentence-transformers embedder, a folder or hub id; None for any other model.

    Raises:
        InputError: if its files are damaged, or its vector is not the state of a text's last token.
    """
    modules = _read(name, "modules.json")
    if modules is None:
        return None
    paths = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    if others := [kind for kind in paths if kind not in _MODULES]:
        raise InputError(f"model {name!r} has a module {', '.join(others)}. {_ONLY}")
    if paths.get("Transformer"):
        raise InputError(
            f"model {name!r} keeps its model in {paths['Transformer']!r}. Save it anew: "
            "SentenceTransformer(...).save(FOLDER) puts the model in the folder itself."
        )
    _check_pooling(name, _read(name, f"{paths.get('Pooling', '')}/config.json".lstrip("/")) or {})
    settings = _read(name, "config_sentence_transformers.json") or {}
    limits = _read(name, "sentence_bert_config.json") or {}
    if settings.get("similarity_fn_name") in ("dot", "dot_product") and "Normalize" not in paths:
        raise InputError(f"model {name!r} compares by dot product, not by cosine, which is not supported.")
    if limits.get("do_lower_case"):
        raise InputError(f"model {name!r} lower-cases texts before its tokenizer, which is not supported.")
    prompts = _prompts(name, settings.get("prompts") or {})
    query, document = (limits.get(f"{side}_length") or limits.get("max_seq_length") for side in ("query", "document"))
    return EmbedderSettings(prompts, query, document, "Normalize" in paths)


def check_causal(name: str, config: PretrainedConfig) -> None:
    """Refuse a model with bidirectional attention.

    Raises:
        InputError: if its configuration says so.
    """
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise InputError(f"model {name!r} is bidirectional ({text.model_type}). {_ONLY}")


def own_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that the post-processor of a model's tokenizer makes.

    Raises:
        InputError: if no token follows the text, or the tokens around it cannot be written as text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"model {name!r}: its tokenizer has no tokenizer.json form.")
    ids = backend.encode(_PROBES[0]).ids
    text = backend.encode(_PROBES[0], add_special_tokens=False).ids
    start = next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), None)
    around = None if start is None else (ids[:start], ids[start + len(text) :])
    if not around or not around[1]:
        raise InputError(
            f"model {name!r}: its tokenizer puts no end token after a text. To train with one, set model.template.end."
        )
    before, after = ([backend.id_to_token(token) for token in part] for part in around)
    template = Template(bos="".join(before), header="", suffix="".join(after[:-1]), end=after[-1])
    baked = bake(tokenizer, template)
    if any(baked(probe)["input_ids"] != backend.encode(probe).ids for probe in _PROBES):
        raise InputError(f"model {name!r}: the tokens that its tokenizer adds have no text. Set model.template.")
    return template


def _check_pooling(name: str, pooling: Mapping[str, Any]) -> None:
    modes = [key.removeprefix("pooling_mode_") for key in pooling if key.startswith("pooling_mode_") and pooling[key]]
    mode = pooling.get("pooling_mode") or modes
    chosen = [mode] if isinstance(mode, str) else list(mode)
    if chosen != ["lasttoken"]:
        pooling_name = " and ".join(chosen).replace("_tokens", "").replace("_token", "") or "mean"
        raise InputError(f"model {name!r} pools by {pooling_name}. {_ONLY}")


def _prompts(name: str, prompts: Mapping[str, str | None]) -> Prompts:
    """The prompts that sentence-transformers puts before queries and documents; unused ones are logged."""
    if others := [key for key, text in prompts.items() if text and key not in ("query", "document")]:
        _log.info("%s: its prompts %s are not used; data.instruction sets that of queries", name, ", ".join(others))
    return Prompts(prompts.get("query") or "", prompts.get("document") or "")


def _read(name: str, file: str) -> Any:  # noqa: ANN401 - JSON
    """A JSON file beside a model, or None if there is no such file."""
    path = file_beside(name, file)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Download or save the model again.") from error
