"""Python packages on disk whose docstrings are known."""

from pathlib import Path

from anchorembed.curate.docstrings import Package

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
REST = "The answer is worked out slowly, step by step, and then written down"


def function(name: str, query: str, rest: str = REST) -> str:
    """Source of a function whose docstring begins with the query."""
    return f'def {name}():\n    """{query}\n\n    {rest} for {query}.\n    """\n\n'


def write(root: Path, name: str, source: str) -> Package:
    """A package of one file."""
    package = root / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source, encoding="utf-8")
    return Package(name, package)


def write_packages(root: Path) -> list[Package]:
    """Twenty packages of ten functions each, all different."""
    made = []
    for number in range(20):
        source = "".join(
            function(word, f"Compute quantity {number} {word} of it", _unlike(100 * number + at))
            for at, word in enumerate(NUMBERS)
        )
        made.append(write(root, f"package{number:02}", source))
    return made


def _unlike(seed: int) -> str:
    """Thirty words that no other seed shares."""
    return " ".join(f"w{seed}x{word}" for word in range(30))
