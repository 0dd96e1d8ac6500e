"""What the README and the guides show: their blocks of code, and the commands in those."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "accelerate",
    "anchorembed",
    "cd",
    "curl",
    "docker",
    "git",
    "llama-server",
    "make",
    "pip",
    "python",
    "ray",
    "text-embeddings-router",
    "torchrun",
    "vllm",
)
_MARK = re.compile(r"\bnot run: *\w")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Code blocks of a page in a language; an empty name is a block of commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)
    return [code for marked, code in found if marked == language]


@dataclass(frozen=True)
class Command:
    """A command line of a page; ``marked`` where the page says that it is not run, and why."""

    line: str
    marked: bool

    @property
    def words(self) -> list[str]:
        """Its words, without variables of the environment before it and the comment after it."""
        words = shlex.split(self.line, comments=True)
        return words[next(number for number, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def command_lines(block: str) -> list[Command]:
    """Commands of a block. `not run: why` in a comment marks its line, or all that follow a comment of its own line."""
    commands: list[Command] = []
    rest_marked = False
    for line in block.splitlines():
        comment = line.partition("#")[2]
        if line.startswith("#"):
            rest_marked = rest_marked or bool(_MARK.search(comment))
        elif re.sub(r"^([A-Z_]+=\S* +)*", "", line).split(" ")[0] in PROGRAMS:
            commands.append(Command(line, rest_marked or bool(_MARK.search(comment))))
    return commands
