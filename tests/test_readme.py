"""The README's Python runs and gives the output it shows; the files and recipes it names are there."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_code_gives_the_output_shown() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 3
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
    assert result.failed == 0


def test_files_it_names_exist() -> None:
    named = set(re.findall(r"`((?:src|tests|recipes|docs|benchmarks)/[\w/.-]+)`", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_file_map_is_complete() -> None:
    modules = {path.name for path in (ROOT / "src" / "anchorembed").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in modules if f"{name} " not in README} == set()
