"""Docstrings to a data set: without duplicates, with whole packages held out, without near-duplicates of held-out ones.

A harvest is a folder: training pairs as JSONL, a BEIR folder of the held-out packages, and a manifest that says for
which installed versions the folder can be reused.
"""

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anchorembed.curate.docstrings import (
    PROJECT,
    Docstring,
    Package,
    collect_docstrings,
    installed_packages,
    lower_case_words,
    runs,
)
from anchorembed.data.beir import write_collection
from anchorembed.data.documents import Document
from anchorembed.errors import InputError
from anchorembed.system.files import hash_texts, whole_folder, write_jsonl

LARGEST_OVERLAP = 0.5

_RULES = 1  # part of the fingerprint; increase it with every change, here or in `docstrings`, that gives other pairs
_TRAIN, _COLLECTION, _MANIFEST = "train.jsonl", "beir", "manifest.json"
_FILES = (_TRAIN, "beir/corpus.jsonl", "beir/queries.jsonl", "beir/qrels/test.tsv")


@dataclass(frozen=True, slots=True)
class HarvestCounts:
    """Pairs written, pairs dropped and files that do not parse in a harvest."""

    train: int
    held_out: int
    duplicates: int
    near_duplicates: int
    unparsed_files: int


@dataclass(frozen=True, slots=True)
class Harvest:
    """A harvest on disk: ``train`` is a JSONL of pairs, ``collection`` a BEIR folder of the held-out packages."""

    folder: Path
    counts: HarvestCounts
    held_out_packages: tuple[str, ...]
    reused: bool

    @property
    def train(self) -> Path:
        """The pairs to train on."""
        return self.folder / _TRAIN

    @property
    def collection(self) -> Path:
        """The pairs of the held-out packages, as a retrieval test."""
        return self.folder / _COLLECTION


def harvest_docstrings(folder: Path, progress: Callable[[int, int], None] | None = None) -> Harvest:
    """Harvest the public docstrings of the standard library and of every installed distribution into a folder.

    The same installed versions give the same pairs; an existing harvest of the same versions is reused.

    Raises:
        InputError: as `harvest_packages` does.
    """
    versions = sorted({f"{item.name}=={item.version}" for item in importlib.metadata.distributions()})
    versions = [version for version in versions if not version.startswith(f"{PROJECT}==")]
    edition = f"Python {platform.python_version()}: {' '.join(versions)}"
    return harvest_packages(folder, installed_packages, edition, progress=progress)


def harvest_packages(
    folder: Path,
    find_packages: Callable[[], Sequence[Package]],
    edition: str,
    *,
    held_out_share: float = 0.1,
    largest_overlap: float = LARGEST_OVERLAP,
    progress: Callable[[int, int], None] | None = None,
) -> Harvest:
    """Harvest packages into a folder, whole, unless it holds a harvest of the same edition and settings.

    Args:
        folder: to write.
        find_packages: lists the packages; called only if no harvest is reused.
        edition: any text that changes when the content of the packages does.
        held_out_share: of the pairs, between 0 and 1.
        largest_overlap: as in `drop_near_duplicates`.
        progress: as in `collect_docstrings`.

    Raises:
        InputError: if the folder holds anything but a harvest, or no package is small enough to be held out.
    """
    fingerprint = hash_texts([json.dumps([_RULES, edition, held_out_share, largest_overlap])])
    earlier = _reusable(folder, fingerprint)
    if earlier is not None:
        return earlier
    _refuse_foreign(folder)
    pairs, unparsed_files = collect_docstrings(find_packages(), progress=progress)
    unique = drop_duplicates(pairs)
    train, held_out = split_packages(unique, held_out_share)
    if not held_out:
        raise InputError(
            f"{folder}: {len(unique)} pairs, and no package small enough to hold out {held_out_share:.0%} of them. "
            "Install more packages, or hold out a larger share."
        )
    kept = drop_near_duplicates(train, held_out, largest_overlap)
    counts = HarvestCounts(len(kept), len(held_out), len(pairs) - len(unique), len(train) - len(kept), unparsed_files)
    packages = tuple(sorted({pair.package for pair in held_out}))
    manifest: dict[str, object] = {"fingerprint": fingerprint, "counts": asdict(counts), "held_out_packages": packages}
    _write(folder, kept, held_out, manifest)
    return Harvest(folder, counts, packages, reused=False)


# --- Which pairs to keep ---------------------------------------------------------------------------------------------


def drop_duplicates(pairs: Iterable[Docstring]) -> list[Docstring]:
    """Keep the first pair of each query and of each positive; letter case and punctuation make no difference."""
    queries: set[str] = set()
    positives: set[str] = set()
    kept = []
    for pair in pairs:
        query, positive = (" ".join(lower_case_words(text)) for text in (pair.query, pair.positive))
        if query not in queries and positive not in positives:
            kept.append(pair)
            queries.add(query)
            positives.add(positive)
    return kept


def split_packages(pairs: Sequence[Docstring], share: float) -> tuple[list[Docstring], list[Docstring]]:
    """Split pairs into those to train on and those held out, by whole packages, in the order of a hash of their names.

    A package with over half of the wanted number of pairs is not held out, so that several packages are.
    """
    sizes = Counter(pair.package for pair in pairs)
    wanted = share * len(pairs)
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: hash_texts([name])):
        if total < 0.9 * wanted and sizes[name] <= wanted / 2 and total + sizes[name] <= 1.1 * wanted:
            chosen.add(name)
            total += sizes[name]
    train = [pair for pair in pairs if pair.package not in chosen]
    return train, [pair for pair in pairs if pair.package in chosen]


def drop_near_duplicates(
    train: Iterable[Docstring], held_out: Iterable[Docstring], largest_overlap: float = LARGEST_OVERLAP
) -> list[Docstring]:
    """Drop training pairs with more than a share ``largest_overlap`` of their 5-word shingles in one held-out pair."""
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, pair in enumerate(held_out):
        for shingle in _shingles(pair):
            holders.setdefault(shingle, []).append(number)
    kept = []
    for pair in train:
        shingles = _shingles(pair)
        shared = Counter(number for shingle in shingles for number in holders.get(shingle, ()))
        if max(shared.values(), default=0) <= largest_overlap * len(shingles):
            kept.append(pair)
    return kept


def _shingles(pair: Docstring) -> set[tuple[str, ...]]:
    """Runs of words within the query or within the positive."""
    return runs(lower_case_words(pair.query)) | runs(lower_case_words(pair.positive))


# --- The folder ------------------------------------------------------------------------------------------------------


def _reusable(folder: Path, fingerprint: str) -> Harvest | None:
    """Return the harvest in the folder if it is complete and has the same fingerprint."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint or manifest["bytes"] != _sizes(folder):
            return None
        return Harvest(folder, HarvestCounts(**manifest["counts"]), tuple(manifest["held_out_packages"]), reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in _FILES}


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, where a folder is needed. Give another path.")
    foreign = {entry.name for entry in folder.iterdir()} - {_TRAIN, _COLLECTION, _MANIFEST} if folder.exists() else ()
    if foreign:
        raise InputError(f"{folder}: holds {min(foreign)!r}, which is no part of a harvest. Give another folder.")


def _write(folder: Path, train: list[Docstring], held_out: list[Docstring], manifest: dict[str, object]) -> None:
    with whole_folder(folder) as partial:
        write_jsonl(partial / _TRAIN, ({"query": p.query, "positive": p.positive, "name": p.name} for p in train))
        queries = ((Document(f"q:{pair.name}", pair.query), pair.name) for pair in held_out)
        write_collection(partial / _COLLECTION, (Document(pair.name, pair.positive) for pair in held_out), queries)
        content = json.dumps(manifest | {"bytes": _sizes(partial)}, indent=1)
        (partial / _MANIFEST).write_text(f"{content}\n", encoding="utf-8")
