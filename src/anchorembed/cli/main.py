"""Run the command line."""

import sys
from io import TextIOWrapper

from anchorembed.cli.commands import training, using  # noqa: F401 - they add their commands
from anchorembed.cli.root import app
from anchorembed.cli.terminal import fail, typed_command
from anchorembed.errors import LESS_MEMORY, InputError, OutOfMemory, first_line, memory_ended, of_files


def main() -> None:
    """Run the command line; the exit code is 2 for faults a user can mend, 130 or 143 when stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that a terminal cannot print are escaped
    try:
        app(standalone_mode=True)
    except OutOfMemory as error:
        fail(f"{error} To continue: {typed_command()}", 2)
    except InputError as error:
        fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not memory_ended(error):
            raise
        fail(f"There is not enough memory: {first_line(error)} {LESS_MEMORY}", 2)
    except OSError as error:
        if not of_files(error):
            fail(f"{type(error).__name__}: {error}", 2)
        fail(f"{error.filename or 'a file'}: {error.strerror or error}. Check the path, its rights and the disk.", 2)
