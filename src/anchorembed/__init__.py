"""AnchorEmbed: turn a decoder-only LLM into a text embedder. Public names are imported when they are first used."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorembed.api import encode, evaluate, search
    from anchorembed.errors import InputError
    from anchorembed.export.run import export
    from anchorembed.export.verify import verify
    from anchorembed.model.embedder import Embedder
    from anchorembed.recipe_file import read_recipe
    from anchorembed.train.run import contrast, reconstruct, train

__version__ = "0.1.0"
__all__ = [
    "Embedder",
    "InputError",
    "contrast",
    "encode",
    "evaluate",
    "export",
    "read_recipe",
    "reconstruct",
    "search",
    "train",
    "verify",
]
_MODULES = {
    "Embedder": "model.embedder",
    "InputError": "errors",
    "contrast": "train.run",
    "encode": "api",
    "evaluate": "api",
    "export": "export.run",
    "read_recipe": "recipe_file",
    "reconstruct": "train.run",
    "search": "api",
    "train": "train.run",
    "verify": "export.verify",
}


class _Package(ModuleType):
    """Keeps `evaluate`, `export`, `search` and `train` the functions, although folders have these names, too."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
