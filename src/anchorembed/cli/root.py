"""The root command, to which `commands` adds the verbs: its help, its version, and how messages are printed."""

import logging
import os
from typing import Annotated

import typer
from typer.core import TyperGroup

import anchorembed
from anchorembed.cli.terminal import Messages, fail, print_line, typed_command

MESSAGES = Messages()
# The verbs that keep what they have finished, and go on from there when they are typed again.
CONTINUED = {"compare", "contrast", "demo", "evaluate", "fit", "reconstruct", "train", "train-arm"}


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run a command; if it is interrupted, print how to go on, where Typer prints nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            is_continued = ctx.invoked_subcommand in CONTINUED
            how = "Nothing that was finished is lost. To continue" if is_continued else "To start again"
            fail(f"Stopped. {how}: {typed_command()}", 130)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train text embedders from decoder-only LLMs, measure them, and use them.\n\n"
    "A fault that you can mend is printed alone, with exit code 2.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print_line(anchorembed.__version__)
        raise typer.Exit


@app.callback()
def _show_messages(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Print what the package logs; of several processes the first prints all of it, the others only warnings."""
    logger = logging.getLogger("anchorembed")
    logger.setLevel(logging.INFO)
    logger.addHandler(MESSAGES)
    MESSAGES.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
