"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file.")]
Pairs = Annotated[
    list[str] | None,
    typer.Option(help="File of pairs, instead of a recipe; several times for several."),
]
Base = Annotated[str | None, typer.Option(help="With --pairs: the model to start from.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="With --pairs: folder of recipe and models.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value.")]
Show = Annotated[bool, typer.Option("--show-config", help="Print every key with its value and meaning, and stop.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Drop and count unusable lines of pairs.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, .gguf file or smollm2-135m.")]
SideOption = Annotated[Literal["query", "document"], typer.Option("--side", help="What the texts are.")]
DimensionsOption = Annotated[
    int | None, typer.Option("--dimensions", help="Keep the first so many components; default all.")
]
Stored = Literal["float32", "int8", "binary"]
