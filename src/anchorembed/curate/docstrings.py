"""A corpus made of what is installed: the first paragraph of a Python docstring asks, the rest answers.

Sources are parsed, never imported. Whole packages are held out for testing, and what is trained on may not repeat them.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anchorembed.errors import InputError
from anchorembed.system.files import write_jsonl

HARVEST_VERSION = 1  # raise it when the rules below change, so that older harvests are made anew
PAIRS_PER_PACKAGE = 1500
LARGEST_SOURCE = 1 << 20  # bytes; larger files are generated tables
LONGEST_POSITIVE = 2000  # characters
QUERY_WORDS = range(3, 61)
FEWEST_POSITIVE_WORDS = 8
SHINGLE_WORDS = 5
LARGEST_OVERLAP = 0.5

_TRAIN, _COLLECTION, _MANIFEST = "train.jsonl", "beir", "manifest.json"
_FILES = (_TRAIN, "beir/corpus.jsonl", "beir/queries.jsonl", "beir/qrels/test.tsv")
_OURSELVES = "anchorembed"
_TEST_PARTS = {"test", "tests", "testing", "conftest", "idlelib", "turtledemo"}
_WORD = re.compile(r"\w+")
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_NO_QUERY = re.compile(
    r"\bdeprecated\b"  # says what not to use
    r"|^(\.\.|>>>|:\w|[-=*#+|])"  # a directive, an example, a field list, a rule or a table
    r"|^(args|arguments|parameters|returns?|raises|examples?|notes?|see also|todo|copyright)\b\s*:?(\s*-+)?"
    r"|^[\w.]+\([^()]*\)(\s*->.*)?$",  # a bare signature
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Package:
    """A top-level package: its import name and its folder or single file."""

    name: str
    root: Path


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring cut in two: ``query`` is its first paragraph on one line, ``positive`` the rest."""

    name: str
    query: str
    positive: str


@dataclass(frozen=True, slots=True)
class HarvestCounts:
    """Pairs written, pairs dropped and files passed over in a harvest."""

    train: int
    held_out: int
    duplicates: int
    near_duplicates: int
    unparsed_files: int


@dataclass(frozen=True, slots=True)
class Harvest:
    """Where a harvest lies: ``train`` is a JSONL of pairs, ``collection`` a BEIR folder of the held-out packages."""

    folder: Path
    train: Path
    collection: Path
    counts: HarvestCounts
    held_out_packages: tuple[str, ...]
    reused: bool


def harvest_docstrings(
    folder: Path, *, held_out_share: float = 0.1, progress: Callable[[int, int], None] | None = None
) -> Harvest:
    """Harvest the public docstrings of the standard library and of every installed distribution into a folder.

    The same installed versions give the same pairs; a harvest already there for them is reused.
    """
    versions = sorted({f"{item.name}=={item.version}" for item in importlib.metadata.distributions()})
    versions = [version for version in versions if not version.startswith(f"{_OURSELVES}==")]
    edition = f"Python {platform.python_version()}: {' '.join(versions)}"
    return harvest_packages(folder, installed_packages, edition, held_out_share=held_out_share, progress=progress)


def harvest_packages(
    folder: Path,
    find_packages: Callable[[], Sequence[Package]],
    edition: str,
    *,
    held_out_share: float = 0.1,
    largest_overlap: float = LARGEST_OVERLAP,
    progress: Callable[[int, int], None] | None = None,
) -> Harvest:
    """Harvest the packages found into a folder, unless it holds a harvest of the same edition and settings.

    The edition is any text that changes when the packages' content does. The folder appears whole or not at all; one
    that holds anything but a harvest raises InputError.
    """
    if not 0 < held_out_share < 1:
        raise InputError(f"held_out_share: {held_out_share} is not between 0 and 1. Give a share such as 0.1.")
    settings = [HARVEST_VERSION, edition, held_out_share, largest_overlap]
    fingerprint = hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()
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
    _write(folder, kept, held_out, counts, fingerprint)
    return _harvest(folder, counts, _packages(held_out), reused=False)


# Finding packages and their sources


def installed_packages() -> list[Package]:
    """Find the top-level packages of the standard library and of the installed distributions, by name."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = {name: library / name for name in sys.stdlib_module_names}
    for distribution in importlib.metadata.distributions():
        for top in {file.parts[0] for file in distribution.files or () if file.suffix == ".py"}:
            roots.setdefault(top.removesuffix(".py"), Path(str(distribution.locate_file(top))).with_suffix(""))
    found = (Package(name, _source(root)) for name, root in sorted(roots.items()) if _is_public(name))
    return [package for package in found if package.root.exists()]


def _source(root: Path) -> Path:
    return root if root.is_dir() else root.with_suffix(".py")


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name not in _TEST_PARTS and name != _OURSELVES


def _modules(package: Package) -> list[tuple[str, Path]]:
    """List a package's public modules as ``(dotted name, file)``, in the order of a hash of the name."""
    if package.root.is_file():
        return [(package.name, package.root)]
    modules = []
    for directory, folders, files in os.walk(package.root):
        folders[:] = [name for name in folders if _is_public(name)]
        parts = (package.name, *Path(directory).relative_to(package.root).parts)
        for file in files:
            stem, suffix = os.path.splitext(file)  # noqa: PTH122 - one split a file, thousands of times
            if suffix == ".py" and (stem == "__init__" or _is_public(stem)):
                name = ".".join(parts if stem == "__init__" else (*parts, stem))
                modules.append((name, Path(directory, file)))
    return sorted(modules, key=lambda module: _hash(module[0]))


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8")).hexdigest()


# Sources to pairs


def collect_docstrings(
    packages: Sequence[Package], *, most: int = PAIRS_PER_PACKAGE, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Docstring], int]:
    """Collect usable docstrings by name, and count the files that do not parse.

    A package gives ``most`` pairs at most: its modules are read in the order of a hash of their names until then, so
    that a giant neither dominates the corpus nor costs the time to parse it whole.
    """
    found: dict[str, Docstring] = {}
    unparsed = 0
    for done, package in enumerate(packages, 1):
        mine: dict[str, Docstring] = {}
        for module, file in _modules(package):
            if len(mine) >= most:
                break
            tree = _parse(file)
            unparsed += tree is None
            for docstring in _docstrings(tree, module) if tree else ():
                mine.setdefault(docstring.name, docstring)
        found.update(list(mine.items())[:most])
        if progress:
            progress(done, len(packages))
    return [found[name] for name in sorted(found)], unparsed


def _parse(file: Path) -> ast.Module | None:
    """Parse a source file: None if it is no readable Python, an empty module if too large or without triple quotes."""
    try:
        source = file.read_bytes() if file.stat().st_size <= LARGEST_SOURCE else b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source if b'"""' in source or b"'''" in source else b"")
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _docstrings(tree: ast.Module, module: str) -> Iterator[Docstring]:
    for name, node in _definitions(tree.body, module):
        cut = cut_docstring(ast.get_docstring(node, clean=False) or "")
        if cut is not None:
            yield Docstring(name, *cut)


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: Iterable[ast.AST], prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Walk the public classes, functions and methods, also those under a condition; not what a function holds."""
    for node in body:
        if isinstance(node, _Definition):
            if not node.name.startswith("_"):
                name = f"{prefix}.{node.name}"
                yield name, node
                if isinstance(node, ast.ClassDef):
                    yield from _definitions(node.body, name)
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(ast.iter_child_nodes(node), prefix)


def cut_docstring(docstring: str) -> tuple[str, str] | None:
    """Cut a docstring into first paragraph and rest; None if either is too short or too long, or is boilerplate."""
    first, *rest = _PARAGRAPH_BREAK.split(inspect.cleandoc(docstring), maxsplit=1)
    if not rest:
        return None
    query, positive = " ".join(first.split()), _shorten(rest[0].strip())
    if len(query.split()) not in QUERY_WORDS or _NO_QUERY.search(query):
        return None
    if len(_words(query)) < QUERY_WORDS.start or len(_words(positive)) < FEWEST_POSITIVE_WORDS:
        return None
    return (query, positive) if _is_encodable(query + positive) else None


def _shorten(text: str) -> str:
    """Cut a text at the last space within the limit."""
    return text if len(text) <= LONGEST_POSITIVE else text[: LONGEST_POSITIVE + 1].rsplit(maxsplit=1)[0].rstrip()


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text) and "\0" not in text


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


# Which pairs to keep, and where


def drop_duplicates(pairs: Iterable[Docstring]) -> list[Docstring]:
    """Keep the first pair of each query and of each positive (letter case and punctuation aside): one right answer."""
    queries: set[str] = set()
    positives: set[str] = set()
    kept = []
    for pair in pairs:
        query, positive = " ".join(_words(pair.query)), " ".join(_words(pair.positive))
        if query not in queries and positive not in positives:
            kept.append(pair)
            queries.add(query)
            positives.add(positive)
    return kept


def split_packages(pairs: Sequence[Docstring], share: float) -> tuple[list[Docstring], list[Docstring]]:
    """Split pairs into train and held out by whole packages, in the order of a hash of the package's name.

    Packages with over half of the wanted number are passed over, so that several are held out.
    """
    sizes = Counter(_package(pair) for pair in pairs)
    wanted = share * len(pairs)
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=_hash):
        if total < 0.9 * wanted and sizes[name] <= wanted / 2 and total + sizes[name] <= 1.1 * wanted:
            chosen.add(name)
            total += sizes[name]
    train = [pair for pair in pairs if _package(pair) not in chosen]
    return train, [pair for pair in pairs if _package(pair) in chosen]


def drop_near_duplicates(
    train: Iterable[Docstring], held_out: Iterable[Docstring], largest_overlap: float = LARGEST_OVERLAP
) -> list[Docstring]:
    """Drop a train pair if over ``largest_overlap`` of its 5-word shingles stand in one single held-out pair."""
    holders: dict[str, list[int]] = {}
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


def _shingles(pair: Docstring) -> set[str]:
    """Runs of five words within the query or within the positive."""
    found: set[str] = set()
    for words in (_words(pair.query), _words(pair.positive)):
        found.update(" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1))
    return found


def _package(pair: Docstring) -> str:
    return pair.name.partition(".")[0]


def _packages(pairs: Iterable[Docstring]) -> tuple[str, ...]:
    return tuple(sorted({_package(pair) for pair in pairs}))


# The folder


def _harvest(folder: Path, counts: HarvestCounts, packages: tuple[str, ...], *, reused: bool) -> Harvest:
    return Harvest(folder, folder / _TRAIN, folder / _COLLECTION, counts, packages, reused)


def _reusable(folder: Path, fingerprint: str) -> Harvest | None:
    """Return the harvest that lies in the folder if it is whole and was made from the same things."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in _FILES}
        if manifest["fingerprint"] != fingerprint or manifest["bytes"] != sizes:
            return None
        return _harvest(folder, HarvestCounts(**manifest["counts"]), tuple(manifest["held_out_packages"]), reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, where a folder is needed. Give another path.")
    foreign = {entry.name for entry in folder.iterdir()} - {_TRAIN, _COLLECTION, _MANIFEST} if folder.exists() else ()
    if foreign:
        raise InputError(f"{folder}: holds {min(foreign)!r}, which is no part of a harvest. Give a folder of its own.")


def _write(
    folder: Path, train: list[Docstring], held_out: list[Docstring], counts: HarvestCounts, fingerprint: str
) -> None:
    """Write all files next to the folder, then let them take its place."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        write_jsonl(partial / _TRAIN, ({"query": p.query, "positive": p.positive, "name": p.name} for p in train))
        collection = partial / _COLLECTION
        write_jsonl(collection / "corpus.jsonl", ({"_id": p.name, "text": p.positive} for p in held_out))
        write_jsonl(collection / "queries.jsonl", ({"_id": f"q:{p.name}", "text": p.query} for p in held_out))
        (collection / "qrels").mkdir()
        judgements = "".join(f"q:{pair.name}\t{pair.name}\t1\n" for pair in held_out)
        (collection / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")
        manifest = {
            "fingerprint": fingerprint,
            "counts": asdict(counts),
            "held_out_packages": _packages(held_out),
            "bytes": {name: (partial / name).stat().st_size for name in _FILES},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _take_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
