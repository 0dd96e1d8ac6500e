"""The harvest of docstrings: what is held out, what is dropped, when it is reused, and that it is written whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anchorembed.curate import harvest as harvesting
from anchorembed.curate.docstrings import Docstring, Package
from anchorembed.curate.harvest import Harvest, harvest_packages
from anchorembed.data.beir import read_collection
from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError


def harvest(folder: Path, packages: list[Package], *, overlap: float = 0.5, edition: str = "first") -> Harvest:
    return harvest_packages(folder, lambda: packages, edition, held_out_share=0.2, largest_overlap=overlap)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_of_equal_queries_or_equal_positives_the_first_by_name_stays() -> None:
    pairs = [
        Docstring("a.f", "Open the door", "push it hard"),
        Docstring("b.f", "open: the DOOR!", "turn the key"),
        Docstring("c.f", "Enter the room", "Push it, hard."),
        Docstring("d.f", "Leave the room", "turn the key"),
    ]
    assert [pair.name for pair in harvesting.drop_duplicates(pairs)] == ["a.f", "d.f"]


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
    _, held_out = harvesting.split_packages(pairs, 0.1)
    assert {pair.name[:5] for pair in held_out} == {"small"}
    assert len(held_out) == 90


def test_a_package_that_would_overshoot_the_share_is_passed_over() -> None:
    pairs = [Docstring(f"p{at:02}.f{n}", "", "") for at in range(25) for n in range(40)]
    _, held_out = harvesting.split_packages(pairs, 0.1)
    assert len(held_out) == 80, "a third package would make 120 of the wanted 100"


def test_too_few_packages_to_hold_any_out_is_an_error(tmp_path: Path, packages: list[Package]) -> None:
    with pytest.raises(InputError, match="no package small enough to hold out 20%"):
        harvest(tmp_path / "out", packages[:3])
    assert not (tmp_path / "out").exists()


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
    assert harvesting.drop_near_duplicates(train, halves) == train
    assert harvesting.drop_near_duplicates(train, [*halves, Docstring("h.g", "", " ".join(words[2:20]))]) == []


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
        "import sys; from pathlib import Path; from anchorembed.curate.harvest import *\n"
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

    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harvesting, "write_jsonl", full_disk)
    with pytest.raises(InputError, match=r"docs: cannot be written .*No space left"):
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
