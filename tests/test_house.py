"""Folders import from those above them only, and each says what is in it."""

import ast
from pathlib import Path

import pytest

import anchorembed

SOURCE = Path(anchorembed.__file__).parent
# From what everything needs to what users call; system to api are folders, the others files.
ORDER = [
    "errors",
    "recipe_schema",
    "recipe_file",
    "system",
    "data",
    "model",
    "export",
    "search",
    "evaluate",
    "curate",
    "train",
    "compare",
    "page",
    "api",
    "fit",
    "demo",
    "cli",
]
ENDS = {"__init__", "__main__"}
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder or file of the order that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Folders and files of the order that a file imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "anchorembed":
            _, *rest = (node.module or "").split(".")
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("anchorembed.")}
    return found


def test_every_file_has_its_place() -> None:
    assert {room(path) for path in FILES} - ENDS == set(ORDER)


@pytest.mark.parametrize("path", [path for path in FILES if room(path) not in ENDS], ids=str)
def test_imports_come_from_above(path: Path) -> None:
    own = room(path)
    allowed = {*ORDER[: ORDER.index(own)], *([own] if len(path.parts) > 1 else [])}
    assert imported(SOURCE / path) <= allowed


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "pairs.py"
    path.write_text("from anchorembed import train\nimport anchorembed.cli\nfrom anchorembed.compare.run import plan\n")
    assert imported(path) == {"train", "cli", "compare"}


@pytest.mark.parametrize("folder", [name for name in ORDER if (SOURCE / name).is_dir()])
def test_a_folder_names_each_of_its_files(folder: str) -> None:
    says = ast.get_docstring(ast.parse((SOURCE / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert [path.stem for path in sorted((SOURCE / folder).glob("[!_]*.py")) if f"`{path.stem}`" not in says] == []
