"""The README's Python runs and gives the output it shows; the files that documents name are there."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.default_model
def test_code_gives_the_output_shown() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 3
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
    assert result.failed == 0


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS)])
def test_files_it_names_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:src|tests|recipes|docs|speed|results)/[\w/.-]*\w)", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_folder_tree_is_complete() -> None:
    tree = README[README.index("src/anchorembed/\n") :].split("```")[0]
    here = {path.name for path in (ROOT / "src" / "anchorembed").iterdir() if path.name[0] not in "_."}
    assert {name for name in here if name not in tree} == {"py.typed"}
