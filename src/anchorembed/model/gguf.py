"""GGUF files, as far as transformers does not read them by itself."""

import json
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


def special_tokens(path: Path) -> dict[str, int]:
    """Ids of a GGUF file's BOS, EOS and padding tokens, if it has them; transformers 5.10 takes its BOS for EOS."""
    import gguf  # noqa: PLC0415 - an extra, which `need_gguf` checks

    fields = gguf.GGUFReader(path).fields
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    given = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: int(field.parts[field.data[0]][0]) for name, field in given.items() if field is not None}


def splits_as_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer splits texts by the rules that ``tokenizer.ggml.pre`` calls ``gpt-2``."""
    rules = tokenizer.backend_tokenizer.pre_tokenizer
    return rules is not None and json.loads(rules.__getstate__()) == _GPT2_RULES


def read_text(path: Path, key: str) -> str:
    """A text in a GGUF file by its key; empty if there is none."""
    import gguf  # noqa: PLC0415 - an extra, which `need_gguf` checks

    field = gguf.GGUFReader(path).fields.get(key)
    return str(field.contents()) if field else ""


def unread_rules(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A file's ``tokenizer.ggml.pre`` if its tokenizer is read with GPT-2's rules for another's; empty otherwise."""
    rules = read_text(path, "tokenizer.ggml.pre") or "gpt-2"
    return rules if rules != "gpt-2" and splits_as_gpt2(tokenizer) else ""


def check_rotary_scaling(path: Path, config: PretrainedConfig) -> None:
    """Refuse a GGUF file with scaled rotary positions that its configuration lacks: transformers reads few of them.

    Raises:
        InputError: with the file's scaling.
    """
    import gguf  # noqa: PLC0415 - an extra, which `need_gguf` checks

    if any(rope.get("rope_type", "default") != "default" for rope in rotary_settings(config)):
        return
    reader = gguf.GGUFReader(path)
    scaling = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    for key, field in reader.fields.items():
        if key.endswith(".rope.scaling.type") and field.contents() != "none":
            scaling.append(f"{key} {field.contents()}")
    if scaling:
        raise InputError(
            f"{path}: its rotary positions are scaled ({', '.join(scaling)}), which transformers does not read from "
            "GGUF. Use the model's safetensors weights."
        )
