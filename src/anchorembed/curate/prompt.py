"""The prompt that asks a chat model for queries of a document, read from a text file of turns; and the reply's queries.

A line ``### system``, ``### user`` or ``### assistant`` begins a turn; a file without such lines is one user's turn.
``{document}`` stands for the document, ``{count}`` for the number of queries to write. An assistant's turn is an
example, of which the first ``{count}`` lines are shown.
"""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from anchorembed.errors import InputError, decoded

Messages = list[dict[str, str]]  # a conversation, as chat models take it

LONGEST_DOCUMENT = 2000  # characters that are shown to the writer
_TURN = re.compile(r"^### (system|user|assistant)[ \t]*$", re.MULTILINE)
_THOUGHTS = re.compile(r"\A(.*</think>)?\s*(<think>.*)?", re.DOTALL)  # complete, and without an end
_BULLET = re.compile(
    r"^(\d+\s*[.):](?!\d)|[-*\u2022](?!\d)|(?:search )?(?:query|question)\s*\d*\s*:|Q\d*\s*:)\s*", re.IGNORECASE
)
_QUOTES = "\"'`*\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb "


@dataclass(frozen=True, slots=True)
class Prompt:
    """Turns of a conversation, ``(role, text)``; the last one is a user's and has ``{document}``."""

    turns: tuple[tuple[str, str], ...]

    def messages(self, document: str, count: int) -> Messages:
        """The conversation that asks for ``count`` queries of a document; long documents are cut."""
        shown = document.strip()[:LONGEST_DOCUMENT]
        return [{"role": role, "content": _filled(role, text, shown, count)} for role, text in self.turns]


def _filled(role: str, text: str, document: str, count: int) -> str:
    if role == "assistant":
        return "\n".join(text.splitlines()[:count])
    return text.replace("{count}", str(count)).replace("{document}", document)


def default_prompt() -> str:
    """The text of the default prompt."""
    return files("anchorembed.curate").joinpath("queries.txt").read_text(encoding="utf-8")


def read_prompt(path: Path | None) -> Prompt:
    """Read a prompt file, or the default one.

    Raises:
        InputError: if it cannot be read, or its last turn is not a user's with ``{document}``.
    """
    try:
        text = default_prompt() if path is None else decoded(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}). Name a text file; --print-prompt shows one.") from error
    before, *parts = _TURN.split(text.replace("\r\n", "\n"))
    if before.strip() and parts:
        raise InputError(f"{path}: it has text before its first turn. Begin with a line such as ### user.")
    pairs = zip(parts[::2], parts[1::2], strict=True) if parts else [("user", before)]
    turns = tuple((role, content.strip()) for role, content in pairs)
    if turns[-1][0] != "user" or "{document}" not in turns[-1][1]:
        raise InputError(
            f"{path}: its last turn is not a user's with {{document}} in it. Put that where the text goes."
        )
    return Prompt(turns)


def ends_in_thoughts(reply: str) -> bool:
    """Whether a model's reply is cut off before its thoughts end."""
    thoughts = _THOUGHTS.match(reply)
    return thoughts is not None and thoughts[2] is not None


def read_reply(reply: str, count: int) -> list[str]:
    """The queries of a model's reply, one a line, without thoughts, numbers, bullets and quotes; at most ``count``.

    Text before ``</think>`` is thoughts, too: some chat templates open them in the prompt.
    """
    reply = reply.encode(errors="replace").decode()  # JSON can hold half of a character, which no file can
    lines = (" ".join(line.split()) for line in _THOUGHTS.sub("", reply).strip().splitlines())
    queries = (_BULLET.sub("", line.strip(_QUOTES)).strip(_QUOTES) for line in lines)
    return [query for query in queries if query][:count]
