"""Python docstrings as pairs: the first paragraph is the query, the rest of the docstring its positive.

Source files are parsed, never imported.
"""

import ast
import importlib.metadata
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorembed.system.files import hash_texts

PROJECT = "anchorembed"  # its own docstrings are left out
PAIRS_PER_PACKAGE = 1500
LARGEST_SOURCE = 1 << 20  # bytes; larger files are generated tables
LONGEST_POSITIVE = 2000  # characters
QUERY_WORDS = range(3, 61)
FEWEST_POSITIVE_WORDS = 8
RUN_WORDS = 5

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
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


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

    @property
    def package(self) -> str:
        """Name of its top-level package."""
        return self.name.partition(".")[0]


# --- Packages and their source files ---------------------------------------------------------------------------------


def installed_packages() -> list[Package]:
    """Return the top-level packages of the standard library and of the installed distributions, by name."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = {name: library / name for name in sys.stdlib_module_names}
    for distribution in importlib.metadata.distributions():
        for top in {file.parts[0] for file in distribution.files or () if file.suffix == ".py"}:
            roots.setdefault(top.removesuffix(".py"), Path(str(distribution.locate_file(top))).with_suffix(""))
    sources = {name: root if root.is_dir() else root.with_suffix(".py") for name, root in sorted(roots.items())}
    return [Package(name, source) for name, source in sources.items() if _is_public(name) and source.exists()]


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_") and name not in _TEST_PARTS and name != PROJECT


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
    return sorted(modules, key=lambda module: hash_texts([module[0]]))


# --- Source files to pairs -------------------------------------------------------------------------------------------


def collect_docstrings(
    packages: Sequence[Package], *, most: int = PAIRS_PER_PACKAGE, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Docstring], int]:
    """Collect the usable docstrings of packages, sorted by name.

    At most ``most`` are taken from each package, so that large packages do not dominate: its modules are parsed in the
    order of a hash of their names until there are as many. ``progress`` is called with the number of packages done and
    of all packages.

    Returns:
        The docstrings, and the number of files that do not parse.
    """
    collected: dict[str, Docstring] = {}
    unparsed = 0
    for done, package in enumerate(packages, 1):
        from_package: dict[str, Docstring] = {}
        for module, file in _modules(package):
            if len(from_package) >= most:
                break
            tree = _parse(file)
            unparsed += tree is None
            for docstring in _docstrings(tree, module) if tree else ():
                from_package.setdefault(docstring.name, docstring)
        collected.update(list(from_package.items())[:most])
        if progress:
            progress(done, len(packages))
    return [collected[name] for name in sorted(collected)], unparsed


def _parse(file: Path) -> ast.Module | None:
    """Parse a source file: None if it cannot be parsed, an empty module if it is too large or has no triple quotes."""
    try:
        source = file.read_bytes() if file.stat().st_size <= LARGEST_SOURCE else b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source if b'"""' in source or b"'''" in source else b"")
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _docstrings(tree: ast.Module, module: str) -> Iterator[Docstring]:
    for name, node in _definitions(tree.body, module):
        parts = cut_docstring(ast.get_docstring(node, clean=False) or "")
        if parts is not None:
            yield Docstring(name, *parts)


def _definitions(body: Iterable[ast.AST], prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Walk the public classes, functions and methods, also inside conditions, but not inside functions."""
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
    """Split a docstring into its first paragraph and the rest; None if a part is too short, too long or boilerplate."""
    paragraph, *rest = _PARAGRAPH_BREAK.split(inspect.cleandoc(docstring), maxsplit=1)
    if not rest:
        return None
    query, positive = " ".join(paragraph.split()), _shorten(rest[0].strip())
    if len(query.split()) not in QUERY_WORDS or _NO_QUERY.search(query):
        return None
    if len(lower_case_words(query)) < QUERY_WORDS.start or len(lower_case_words(positive)) < FEWEST_POSITIVE_WORDS:
        return None
    is_encodable = not re.search("[\ud800-\udfff\0]", query + positive)
    return (query, positive) if is_encodable else None


def _shorten(text: str) -> str:
    """Cut a text at the last space within the limit."""
    return text if len(text) <= LONGEST_POSITIVE else text[: LONGEST_POSITIVE + 1].rsplit(maxsplit=1)[0].rstrip()


def lower_case_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Runs of `RUN_WORDS` words each (shingles); a shorter text has none."""
    return {tuple(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)}
