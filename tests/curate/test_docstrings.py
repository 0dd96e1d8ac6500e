"""The harvest of docstrings: what is taken, what is held out, what is dropped, and that nothing is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anchorembed.curate import docstrings as corpora
from anchorembed.curate.docstrings import (
    Docstring,
    Harvest,
    Package,
    collect_docstrings,
    cut_docstring,
    harvest_packages,
)
from anchorembed.data.beir import read_collection
from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
REST = "The answer is worked out slowly, step by step, and then written down"


def function(name: str, query: str, rest: str = REST) -> str:
    return f'def {name}():\n    """{query}\n\n    {rest} for {query}.\n    """\n\n'


def unlike(seed: int) -> str:
    """Thirty words that no other seed shares."""
    return " ".join(f"w{seed}x{word}" for word in range(30))


def write(root: Path, name: str, source: str) -> Package:
    package = root / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source, encoding="utf-8")
    return Package(name, package)


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    """Twenty packages of ten functions each, all different."""
    made = []
    for number in range(20):
        source = "".join(
            function(word, f"Compute quantity {number} {word} of it", unlike(100 * number + at))
            for at, word in enumerate(NUMBERS)
        )
        made.append(write(tmp_path / "site", f"package{number:02}", source))
    return made


def harvest(folder: Path, packages: list[Package], *, overlap: float = 0.5, edition: str = "first") -> Harvest:
    return harvest_packages(folder, lambda: packages, edition, held_out_share=0.2, largest_overlap=overlap)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


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
    assert 1990 <= len(cut[1]) <= corpora.LONGEST_POSITIVE
    assert set(cut[1].split()) == {"seven77"}


def test_of_equal_queries_or_equal_positives_the_first_by_name_stays() -> None:
    pairs = [
        Docstring("a.f", "Open the door", "push it hard"),
        Docstring("b.f", "open: the DOOR!", "turn the key"),
        Docstring("c.f", "Enter the room", "Push it, hard."),
        Docstring("d.f", "Leave the room", "turn the key"),
    ]
    assert [pair.name for pair in corpora.drop_duplicates(pairs)] == ["a.f", "d.f"]


def test_held_out_packages_are_whole_several_and_about_the_share(tmp_path: Path, packages: list[Package]) -> None:
    result = harvest(tmp_path / "out", packages)
    trained = {json.loads(line)["name"].split(".")[0] for line in result.train.open(encoding="utf-8")}
    assert trained.isdisjoint(result.held_out_packages)
    assert trained | set(result.held_out_packages) == {package.name for package in packages}
    assert len(result.held_out_packages) == 4
    assert (result.counts.train, result.counts.held_out) == (160, 40)


def test_a_package_with_over_half_of_the_wanted_pairs_is_never_held_out() -> None:
    pairs = [Docstring(f"small{at:02}.f{n}", "", "") for at in range(50) for n in range(5)]
    pairs += [Docstring(f"large{at:02}.f{n}", "", "") for at in range(10) for n in range(75)]
    _, held_out = corpora.split_packages(pairs, 0.1)
    assert {pair.name[:5] for pair in held_out} == {"small"}
    assert len(held_out) == 90


def test_a_package_that_would_overshoot_the_share_is_passed_over() -> None:
    pairs = [Docstring(f"p{at:02}.f{n}", "", "") for at in range(25) for n in range(40)]
    _, held_out = corpora.split_packages(pairs, 0.1)
    assert len(held_out) == 80, "a third package would make 120 of the wanted 100"


def test_too_few_packages_to_hold_any_out_is_an_error(tmp_path: Path, packages: list[Package]) -> None:
    with pytest.raises(InputError, match="no package small enough to hold out 20%"):
        harvest(tmp_path / "out", packages[:3])
    assert not (tmp_path / "out").exists()


def test_a_share_outside_0_and_1_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"held_out_share: 1\.5 is not between 0 and 1"):
        corpora.harvest_docstrings(tmp_path / "out", held_out_share=1.5)


@pytest.mark.parametrize(("overlap", "dropped"), [(0.5, 1), (1.0, 0)])
def test_a_train_pair_that_repeats_a_held_out_one_is_dropped(
    tmp_path: Path, packages: list[Package], overlap: float, dropped: int
) -> None:
    held = harvest(tmp_path / "before", packages).held_out_packages[0]
    original = (tmp_path / "site" / held / "__init__.py").read_text(encoding="utf-8").split("def two")[0]
    trained = next(
        package for package in packages if package.name not in harvest(tmp_path / "before", packages).held_out_packages
    )
    copied = original.replace("def one", "def copied").replace("Compute", "Reckon")
    with (trained.root / "__init__.py").open("a", encoding="utf-8") as source:
        source.write(copied)

    result = harvest(tmp_path / "after", packages, overlap=overlap)
    names = {json.loads(line)["name"] for line in result.train.open(encoding="utf-8")}
    assert held in result.held_out_packages
    assert result.counts.near_duplicates == dropped
    assert (f"{trained.name}.copied" in names) == (not dropped)


def test_overlap_is_counted_against_one_held_out_text_not_their_union() -> None:
    words = [f"w{at}" for at in range(24)]
    train = [Docstring("t.f", "", " ".join(words))]
    halves = [Docstring(f"h.f{at}", "", " ".join(words[at * 12 : at * 12 + 12])) for at in range(2)]
    assert corpora.drop_near_duplicates(train, halves) == train
    assert corpora.drop_near_duplicates(train, [*halves, Docstring("h.g", "", " ".join(words[2:20]))]) == []


def test_the_harvest_reads_back_as_pairs_and_as_a_collection(tmp_path: Path, packages: list[Package]) -> None:
    result = harvest(tmp_path / "out", packages)
    rows = [json.loads(line) for line in result.train.open(encoding="utf-8")]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert [(pair.query, pair.positive) for pair in read_pairs(result.train)] == [
        (row["query"], row["positive"]) for row in rows
    ]
    collection = read_collection(result.collection)
    assert len(collection.queries) == len(collection.documents) == result.counts.held_out
    assert all(collection.qrels[f"q:{document.id}"] == {document.id: 1} for document in collection.documents)
    texts = {query.id: query.text for query in collection.queries}
    assert all(texts[f"q:{document.id}"] in document.text for document in collection.documents), "made so by function()"


def test_the_same_packages_give_the_same_bytes_whatever_the_order(tmp_path: Path, packages: list[Package]) -> None:
    first = harvest(tmp_path / "first", packages)
    second = harvest(tmp_path / "second", packages[::-1])
    assert content(first.folder) == content(second.folder)


def test_the_content_does_not_hang_on_the_seed_of_hash(tmp_path: Path, packages: list[Package]) -> None:
    code = (
        "import sys; from pathlib import Path; from anchorembed.curate.docstrings import *\n"
        "root = Path(sys.argv[1]); found = [Package(p.name, p) for p in root.iterdir()]\n"
        "harvest_packages(Path(sys.argv[2]), lambda: found, 'first', held_out_share=0.2)"
    )
    for seed in "12":
        arguments = [sys.executable, "-c", code, str(packages[0].root.parent), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_harvest_is_reused_until_its_edition_settings_or_files_change(
    tmp_path: Path, packages: list[Package]
) -> None:
    folder = tmp_path / "out"
    first = harvest(folder, packages)
    assert not first.reused

    def unwanted() -> list[Package]:
        raise AssertionError("packages were looked for again")

    again = harvest_packages(folder, unwanted, "first", held_out_share=0.2)
    assert again.reused
    assert (again.counts, again.held_out_packages) == (first.counts, first.held_out_packages)
    assert not harvest(folder, packages, edition="second").reused
    assert not harvest(folder, packages, edition="second", overlap=0.4).reused
    first.train.write_text("cut short", encoding="utf-8")
    assert not harvest(folder, packages, edition="second", overlap=0.4).reused
    (folder / "manifest.json").write_text("[]", encoding="utf-8")
    assert not harvest(folder, packages, edition="second", overlap=0.4).reused
    assert harvest(folder, packages, edition="second", overlap=0.4).reused


def test_a_failed_harvest_leaves_the_earlier_one_and_nothing_else(
    tmp_path: Path, packages: list[Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "docs"
    harvest(folder, packages)
    before = content(folder)

    def full_disk(new: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora, "_take_place", full_disk)
    with pytest.raises(OSError, match="No space left"):
        harvest(folder, packages, edition="second")
    assert content(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["docs"]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, packages: list[Package]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(InputError, match=r"out: holds 'thesis\.txt', which is no part of a harvest"):
        harvest(tmp_path / "out", packages)
    with pytest.raises(InputError, match="a file, where a folder is needed"):
        harvest(tmp_path / "out" / "thesis.txt", packages)


def test_installed_packages_hold_the_library_and_distributions_but_not_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("anchorembed", "neighbour"):
        write(tmp_path, name, "")
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", encoding="utf-8")
        (tmp_path / f"{name}-1.0.dist-info" / "RECORD").write_text(f"{name}/__init__.py,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {package.name: package.root for package in corpora.installed_packages()}
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
