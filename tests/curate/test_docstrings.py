"""Docstrings of source files: which are taken, how each is cut, and that nothing is imported."""

import sys
from pathlib import Path

import pytest

from anchorembed.curate import docstrings
from anchorembed.curate.docstrings import Package, collect_docstrings, cut_docstring
from python_packages import NUMBERS, REST, function, write


def collected(package: Package) -> list[str]:
    return [docstring.name for docstring in collect_docstrings([package])[0]]


def test_public_functions_classes_and_methods_are_taken_and_private_names_are_not(tmp_path: Path) -> None:
    source = f'''
class Public:
    """A class that says something.

    {REST}.
    """

    @property
    def method(self):
        """A method that says something.

        {REST}.
        """

    def _method(self):
        """A private method that says something.

        {REST}.
        """

class _Private:
    def method(self):
        """A method of something private.

        {REST}.
        """

async def outer():
    """A coroutine that says something.

    {REST}.
    """
    def inner():
        """A function nobody can reach.

        {REST}.
        """

try:
    import nothing
except ImportError:
    if True:
        def fallback():
            """A function under a condition here.

            {REST}.
            """
'''
    package = write(tmp_path, "alpha", source)
    for hidden in ("_private.py", "tests/test_it.py", "_vendor/__init__.py", "test/__init__.py", "not-a-name.py"):
        (package.root / hidden).parent.mkdir(exist_ok=True)
        (package.root / hidden).write_text(function("hidden", "Say nothing about it"), encoding="utf-8")
    (package.root / "sub").mkdir()
    (package.root / "sub" / "module.py").write_text(function("deep", "Say it from below"), encoding="utf-8")

    assert collected(package) == [
        "alpha.Public",
        "alpha.Public.method",
        "alpha.fallback",
        "alpha.outer",
        "alpha.sub.module.deep",
    ]


def test_a_package_may_be_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(function("call", "Call it by name"), encoding="utf-8")
    assert collected(Package("alone", tmp_path / "alone.py")) == ["alone.call"]


def test_nothing_is_imported(tmp_path: Path) -> None:
    trap = f"raise SystemExit('imported')\n{function('call', 'Call it by name')}"
    package = write(tmp_path, "trapped", trap)
    assert collected(package) == ["trapped.call"]
    assert "trapped" not in sys.modules


def test_files_that_do_not_parse_are_counted_and_passed_over(tmp_path: Path) -> None:
    package = write(tmp_path, "alpha", function("call", "Call it by name"))
    (package.root / "template.py").write_text('"""A template."""\n{% not python %}', encoding="utf-8")
    (package.root / "zero.py").write_bytes(b'"""zero"""\n\0')
    (package.root / "coded.py").write_bytes(b'"""caf\xe9"""\n')
    (package.root / "gone.py").symlink_to(package.root / "nowhere.py")
    (package.root / "huge.py").write_text(
        "# filler\n" * 200_000 + function("huge", "Say it at length"), encoding="utf-8"
    )

    pairs, unparsed = collect_docstrings([package])
    assert [pair.name for pair in pairs] == ["alpha.call"]
    assert unparsed == 4


def test_a_giant_package_gives_a_fixed_share_of_its_modules(tmp_path: Path) -> None:
    package = write(tmp_path, "giant", "")
    for word in NUMBERS:
        source = function("first", f"Do the first {word}") + function("second", f"Do the second {word}")
        (package.root / f"{word}.py").write_text(source, encoding="utf-8")
    taken, _ = collect_docstrings([package], most=7)
    again, _ = collect_docstrings([package], most=7)
    assert len(taken) == 7
    assert taken == again
    assert {pair.name.split(".")[1] for pair in taken} != set(sorted(NUMBERS)[:4]), "by hash, not by alphabet"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (f"Say what\n    it does.\n\n    {REST}\n      as is.  \n    ", ("Say what it does.", f"{REST}\n  as is.")),
        (f"Say what it does.\n  \t\n    {REST}", ("Say what it does.", REST)),
        ("Say what it does.", None),
        (f"Too short.\n\n{REST}", None),
        ("word " * 61 + f"\n\n{REST}", None),
        ("Say what it does.\n\nToo short a rest for this.", None),
        ("Say what it does.\n\n----- ----- ----- ----- ----- ----- ----- ----- -----", None),
        (f".. deprecated:: 1.0 and so on\n\n{REST}", None),
        (f"This one is deprecated.\n\n{REST}", None),
        (f"Parameters\n---------- of it all\n\n{REST}", None),
        (f">>> call it now\n\n{REST}", None),
        (f"pkg.call(first, second, third) -> int\n\n{REST}", None),
        (f"Say what \ud800 does.\n\n{REST}", None),
    ],
)
def test_a_docstring_is_cut_after_its_first_paragraph(docstring: str, expected: tuple[str, str] | None) -> None:
    assert cut_docstring(docstring) == expected


def test_a_long_rest_is_cut_between_words() -> None:
    cut = cut_docstring("Say what it does.\n\n" + "seven77 " * 1000)
    assert cut is not None
    assert 1990 <= len(cut[1]) <= docstrings.LONGEST_POSITIVE
    assert set(cut[1].split()) == {"seven77"}


@pytest.mark.slow
def test_installed_packages_hold_the_library_and_distributions_but_not_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("anchorembed", "neighbour"):
        write(tmp_path, name, "")
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", encoding="utf-8")
        (tmp_path / f"{name}-1.0.dist-info" / "RECORD").write_text(f"{name}/__init__.py,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {package.name: package.root for package in docstrings.installed_packages()}
    assert found["json"].is_dir()
    assert found["textwrap"].suffix == ".py"
    assert found["pytest"].is_dir()
    assert found["neighbour"] == tmp_path / "neighbour"
    assert "anchorembed" not in found
    assert not {name for name in found if name.startswith("_") or name in ("idlelib", "turtledemo")}


def test_progress_tells_how_far_it_is(packages: list[Package]) -> None:
    calls: list[tuple[int, int]] = []
    collect_docstrings(packages[:2], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
