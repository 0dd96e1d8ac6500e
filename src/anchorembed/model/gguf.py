"""GGUF files, as far as transformers does not read them by itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from anchorembed.errors import InputError, extra
from anchorembed.model.positions import rotary_settings

_GPT2_RULES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def need_gguf() -> None:
    """Refuse GGUF files without the package that transformers reads them with, before anything is downloaded."""
    with extra("gguf"):
        import_module("gguf")


def dequantised() -> dict[str, Any]:
    """Options by which transformers dequantises a GGUF file's weights; versions without `GgufConfig` always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@dataclass(frozen=True, slots=True)
class _Header:
    """A GGUF file's single texts and numbers by key, without its lists, and the names of its tensors."""

    fields: Mapping[str, Any]
    tensors: tuple[str, ...]


def _header(path: Path) -> _Header:
    """Read a file's header, once while it does not change: a vocabulary of 150,000 tokens takes seconds."""
    state = path.stat()
    return _read_header(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_header(path: Path, _size: int, _time: int) -> _Header:
    import gguf  # noqa: PLC0415 - an extra, which `need_gguf` checks

    reader = gguf.GGUFReader(path)
    single = {key: field for key, field in reader.fields.items() if field.types[:1] != [gguf.GGUFValueType.ARRAY]}
    fields = {key: field.contents() for key, field in single.items()}
    return _Header(fields, tuple(tensor.name for tensor in reader.tensors))


def special_tokens(path: Path) -> dict[str, int]:
    """Ids of a GGUF file's BOS, EOS and padding tokens, if it has them; transformers 5.10 takes its BOS for EOS."""
    fields = _header(path).fields
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    given = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: token_id for name, token_id in given.items() if token_id is not None}


def splits_as_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer splits texts by the rules that ``tokenizer.ggml.pre`` calls ``gpt-2``."""
    rules = tokenizer.backend_tokenizer.pre_tokenizer
    return rules is not None and json.loads(rules.__getstate__()) == _GPT2_RULES


def read_text(path: Path, key: str) -> str:
    """A text in a GGUF file by its key; empty if there is none."""
    return str(_header(path).fields.get(key, ""))


def unread_rules(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A file's ``tokenizer.ggml.pre`` if its tokenizer is read with GPT-2's rules for another's; empty otherwise."""
    rules = read_text(path, "tokenizer.ggml.pre") or "gpt-2"
    return rules if rules != "gpt-2" and splits_as_gpt2(tokenizer) else ""


def check_rotary_scaling(path: Path, config: PretrainedConfig) -> None:
    """Refuse a GGUF file with scaled rotary positions that its configuration lacks: transformers reads few of them.

    Raises:
        InputError: with the file's scaling.
    """
    if any(rope.get("rope_type", "default") != "default" for rope in rotary_settings(config)):
        return
    header = _header(path)
    scaling = [name for name in header.tensors if name.startswith(("rope_freqs.", "rope_factors_"))]
    for key, value in header.fields.items():
        if key.endswith(".rope.scaling.type") and value != "none":
            scaling.append(f"{key} {value}")
    if scaling:
        raise InputError(
            f"{path}: its rotary positions are scaled ({', '.join(scaling)}), which transformers does not read from "
            "GGUF. Use the model's safetensors weights."
        )
