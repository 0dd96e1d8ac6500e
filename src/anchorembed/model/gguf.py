"""GGUF files, as far as transformers does not read them by itself."""

from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from anchorembed.errors import extra


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
