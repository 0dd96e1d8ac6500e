"""Settings for transformers 4 in a saved model, beside those of version 5, so that both load it with equal vectors.

transformers 5 keeps rotary settings under ``rope_parameters``. Version 4 ignores that key and would silently take its
defaults. Version 5 names the tokenizer's class ``TokenizersBackend``, which version 4 does not have.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_transformers4_settings(folder: Path, **more: object) -> None:
    """Add the settings of transformers 4 to a saved model's ``config.json`` and ``tokenizer_config.json``.

    ``more`` are other keys to set in ``config.json``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= transformers4_rope(config.get("rope_parameters") or {}) | {"torch_dtype": config["dtype"]} | more
    write_settings(folder / "config.json", config)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_settings(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def transformers4_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under the keys of transformers 4, where full and sliding attention may differ in their theta."""
    if "full_attention" not in rope:
        return _flat_rope(rope) if "rope_theta" in rope else {}
    older = _flat_rope(rope["full_attention"])
    if sliding := rope.get("sliding_attention"):
        older["rope_local_base_freq"] = sliding["rope_theta"]
    return older


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as transformers does: JSON with sorted keys."""
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flat_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    top_level = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in top_level}
    return top_level | ({} if rope.get("rope_type") == "default" else {"rope_scaling": scaling})
