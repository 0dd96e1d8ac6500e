"""Run command lines with packages hidden, each in a fork of one process that has imported what most of them import.

So a command takes no seconds to start. What is imported before a fork must have none of the packages to hide.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

from without import hide, python

Command = tuple[str, list[str]]  # packages to hide, separated by commas, and arguments


def run_without(commands: Sequence[Command]) -> list["CompletedProcess[str]"]:
    """Run command lines one after the other, each to its end."""
    done = python(__file__, json.dumps(commands))
    if done.returncode:
        raise RuntimeError(done.stderr)
    results = zip(commands, json.loads(done.stdout), strict=True)
    return [CompletedProcess(arguments, *result) for (_, arguments), result in results]


def _run(command: Command, output: Path, errors: Path) -> None:
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    packages, sys.argv[1:] = command
    hide(*packages.split(","))
    from anchorembed.cli.main import main  # noqa: PLC0415 - as where packages are not installed

    main()


def _exit_code_and_streams(command: Command) -> tuple[int | None, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = multiprocessing.get_context("fork").Process(target=_run, args=(command, output, errors))
        process.start()
        process.join()
        return process.exitcode, output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8")


if __name__ == "__main__":
    import anchorembed.cli.main
    import anchorembed.model.embedder  # noqa: F401 - with torch and transformers

    sys.stdout.write(json.dumps([_exit_code_and_streams(command) for command in json.loads(sys.argv[1])]))
