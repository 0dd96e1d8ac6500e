"""What the command line prints, and how it ends."""

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from typing import NoReturn

from rich.console import Console

from anchorembed.system.files import to_json


class Messages(logging.Handler):
    """Prints what the package logs to standard error: the messages alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message."""
        say(record.getMessage())


def typed_command() -> str:
    """The command that was typed; for one of several processes, what their launcher is to start again."""
    command = shlex.join(["anchorembed", *sys.argv[1:]])
    return command if os.environ.get("WORLD_SIZE", "1") == "1" else f"the same launcher with -m {command}"


def say(message: str) -> None:
    """Print a message to standard error, as it is."""
    sys.stderr.write(f"{message}\n")  # above a progress bar, if one is shown
    sys.stderr.flush()


def print_line(text: str) -> None:
    """Print a line to standard output."""
    sys.stdout.write(f"{text}\n")  # typer.echo would write UTF-8 even where the terminal's encoding is ASCII
    sys.stdout.flush()


def print_json(record: Mapping[str, object]) -> None:
    """Print a record as JSON, with escapes where the terminal cannot print its characters."""
    text = to_json(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = to_json(record)
    print_line(text)


def fail(message: str, code: int) -> NoReturn:
    """Print an error and end with an exit code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(message, style="bold red")
    raise SystemExit(code)
