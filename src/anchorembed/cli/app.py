"""The command line's application, and the arguments that several commands have."""

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

import anchorembed
from anchorembed.cli.terminal import Messages, fail, print_line, typed_command

RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value.", show_default=False)]
Show = Annotated[bool, typer.Option("--show-config", help="Print every key with its value and meaning, and stop.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Drop and count unusable lines of pairs.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, .gguf file or smollm2-135m.")]
SideOption = Annotated[Literal["query", "document"], typer.Option("--side", help="What the texts are.")]
DimensionsOption = Annotated[
    int | None, typer.Option("--dimensions", help="Keep the first so many components; default all.", show_default=False)
]
Stored = Literal["float32", "int8", "binary"]

MESSAGES = Messages()


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run a command; one that is stopped says so, where Typer prints nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail(f"Stopped. Nothing that was finished is lost. To continue: {typed_command()}", 130)


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
