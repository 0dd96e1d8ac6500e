"""AnchorEmbed: turn a decoder-only LLM into a text embedder. Public names are loaded when first used."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Embedder": "embedder",
    "InputError": "errors",
    "contrast": "training",
    "encode": "verbs",
    "evaluate": "verbs",
    "export": "exporting",
    "read_recipe": "config",
    "reconstruct": "training",
    "search": "verbs",
    "train": "training",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - strings, only not written out twice


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
