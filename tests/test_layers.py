"""Each file imports only from files above it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "anchorembed"
ORDER = [
    "errors",
    "config",
    "similarity",
    "runtime",
    "progress",
    "rows",
    "records",
    "testsets",
    "corpora",
    "store",
    "tokens",
    "checking",
    "sampling",
    "packing",
    "distributed",
    "models",
    "memory",
    "attention",
    "backbone",
    "embedder",
    "reconstruction",
    "contrastive",
    "gradcache",
    "steps",
    "flops",
    "checkpoint",
    "indexing",
    "evaluation",
    "mining",
    "vectors",
    "clusters",
    "scoring",
    "benchmarking",
    "mtebtasks",
    "tasks",
    "loop",
    "preparing",
    "training",
    "profiling",
    "significance",
    "arms",
    "results",
    "analysing",
    "figures",
    "reporting",
    "comparing",
    "gathering",
    "exporting",
    "verbs",
    "demo",
    "cli",
]
ENDS = {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    """Names of our modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anchorembed"):
            rest = (node.module or "").removeprefix("anchorembed").lstrip(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("anchorembed.") for alias in node.names if alias.name.startswith("anchorembed")
            }
    return found


def test_every_file_has_its_place() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert {path.stem for path in SOURCE.glob("*.py")} - ENDS == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upward_only(name: str) -> None:
    assert imported(SOURCE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "records.py"
    path.write_text("from anchorembed import training\nimport anchorembed.cli\nfrom anchorembed.demo import demo\n")
    assert imported(path) == {"training", "cli", "demo"}
