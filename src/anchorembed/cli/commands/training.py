"""Commands that look at pairs, add to them, and train."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from anchorembed.cli.options import Base, Output, Pairs, RecipeFile, Set, Show, SkipBad
from anchorembed.cli.recipes import recipe_of_options, resolve_recipe, resumable, show_or_check, skipping
from anchorembed.cli.root import app
from anchorembed.cli.terminal import fail, print_json, print_line, say, typed_command
from anchorembed.errors import InputError, OutOfMemory, extra
from anchorembed.recipe_file import read_as


@app.command()
def check(
    recipe: RecipeFile = None,
    pairs: Pairs = None,
    base: Base = None,
    output: Output = None,
    set_: Set = None,
    tests: Annotated[
        list[Path] | None,
        typer.Option("--test", help="BEIR folder, test file or folder of them whose texts should not be trained on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a source a line.")] = False,
) -> None:
    """Report on pairs: counts, lengths, cut texts, dropped lines, duplicates, texts of tests, with examples."""
    if pairs or base or output:
        changes = [*(set_ or ()), *skipping(skip_bad=True)]
        resolved = recipe_of_options(recipe, pairs, base, output or Path(), changes)  # nothing is written to output
    else:
        resolved = resolve_recipe(recipe, set_)
    from anchorembed.api import check as run
    from anchorembed.curate.check import report

    for source in run(resolved, tests or ()):
        print_json(asdict(source)) if as_json else print_line(report(source))


@app.command()
def mine(  # noqa: PLR0913, PLR0917 - each an option
    pairs: Annotated[str, typer.Argument(help="File or folder of pairs, or hf://owner/name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSONL to write; gzipped if it ends in .gz.")],
    by: Annotated[str, typer.Option(help="bm25, or a model as in evaluate.")] = "bm25",
    corpus: Annotated[Path | None, typer.Option(help="Corpus to mine from, besides the positives.")] = None,
    count: Annotated[int, typer.Option(help="Negatives of each pair.")] = 1,
    ranks: Annotated[tuple[int, int], typer.Option(help="First and last rank to take from.")] = (1, 100),
    margin: Annotated[float, typer.Option(help="Leave out what scores above this share of the positive's.")] = 0.95,
    rerank: Annotated[str | None, typer.Option(help="Cross-encoder that scores the candidates again.")] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Mine hard negatives by BM25 or with a model; a cross-encoder may score them again."""
    from anchorembed.api import mine as run
    from anchorembed.curate.mine import Rules

    rules = Rules(count, *ranks, margin)
    mined = run(pairs, out, by=by, corpus=corpus, rules=rules, rerank=rerank, skip_bad=skip_bad)
    for number, many in sorted(mined.by_negatives.items()):
        print_line(f"{many:>9,} pairs with {number} mined")
    for reason, many in mined.dropped.items():
        print_line(f"{many:>9,} candidates left out: {reason}")
    print_line(str(out))


def _print_prompt(asked: bool) -> None:
    """Print the default prompt of `fit`, and stop."""
    if asked:
        from anchorembed.curate.prompt import default_prompt

        print_line(default_prompt().rstrip())
        raise typer.Exit


@app.command()
def fit(  # noqa: PLR0913, PLR0917 - a command's options
    corpus: Annotated[Path, typer.Argument(help="JSONL with text and optional _id; or .txt, a text a line.")],
    base: Annotated[str, typer.Option(help="Model to start from, and to write queries with.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of data, recipe and models.")],
    writer: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible endpoint to write with; key: $ANCHOREMBED_WRITER_KEY."),
    ] = None,
    writer_model: Annotated[str | None, typer.Option(help="The endpoint's name of its model.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="File of the prompt.")] = None,
    print_prompt: Annotated[
        bool, typer.Option("--print-prompt", callback=_print_prompt, is_eager=True, help="Print the default prompt.")
    ] = False,
    queries: Annotated[int, typer.Option(help="Queries of a document.")] = 2,
    temperature: Annotated[float, typer.Option(help="Of the writer; 0 is greedy.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the writer.")] = 0,
    found_in: Annotated[int, typer.Option(help="Keep a query whose document is found at this rank or better.")] = 10,
    found_by: Annotated[str, typer.Option(help="What finds it: bm25, or a model.")] = "bm25",
    held_out: Annotated[int, typer.Option(help="Documents to test on, at most a fifth.")] = 200,
    set_: Set = None,
) -> None:
    """Write queries for documents that have none, train on them, and say whether it helped."""
    with extra("eval,mine"):
        import bm25s  # noqa: F401 - a missing package is reported now, not after hours

        import anchorembed.evaluate.find  # noqa: F401 - as above
    from anchorembed import fit as module

    writing = module.Writing(writer, writer_model, prompt, queries, temperature, seed, found_by, found_in, held_out)
    with resumable():
        print_line(str(module.fit(corpus, base, output, writing=writing, overrides=set_ or ())))


@app.command()
def train(
    recipe: RecipeFile = None,
    pairs: Pairs = None,
    base: Base = None,
    output: Output = None,
    set_: Set = None,
    show: Show = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train the stages, and say whether it helped; finished ones are skipped, interrupted ones resumed."""
    if pairs or base or output:
        resolved = recipe_of_options(recipe, pairs, base, output, [*(set_ or ()), *skipping(skip_bad)])
        show_or_check(resolved, show)
    else:
        resolved = resolve_recipe(recipe, set_, show, skip_bad)
    from anchorembed.train import run as training

    with resumable():
        training.train(resolved)


@app.command()
def reconstruct(recipe: RecipeFile = None, set_: Set = None, show: Show = False, skip_bad: SkipBad = False) -> None:
    """Train Stage I alone: reconstruct each side of a pair from the other's anchor."""
    resolved = resolve_recipe(recipe, set_, show, skip_bad)
    from anchorembed.train import run as training

    with resumable():
        training.reconstruct(resolved)


@app.command()
def contrast(recipe: RecipeFile = None, set_: Set = None, show: Show = False, skip_bad: SkipBad = False) -> None:
    """Train Stage II alone: contrastive learning, from the Stage I model if it is complete."""
    resolved = resolve_recipe(recipe, set_, show, skip_bad)
    from anchorembed.train import run as training

    with resumable():
        training.contrast(resolved)


@app.command()
def profile(
    recipe: RecipeFile = None,
    set_: Set = None,
    stage: Annotated[Literal["reconstruct", "contrast", "both"], typer.Option(help="Which stage.")] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps a stage, after 2 to warm up.")] = 5,
) -> None:
    """Run a few steps of a recipe: tokens a second, memory, share of the machine's peak, where the time goes."""
    resolved = resolve_recipe(recipe, set_)
    from anchorembed.train.profile import profile as run
    from anchorembed.train.profile import report
    from anchorembed.train.run import STAGES

    chosen = [name for name in STAGES if stage == name or (stage == "both" and resolved.stage(name))]
    if not chosen:
        raise InputError("recipe: both reconstruct and contrast are null. Give one settings.")
    for name in chosen:
        print_line(report(run(resolved, name, steps)))


@app.command()
def demo(
    recipe: RecipeFile = None,
    set_: Set = None,
    show: Show = False,
    minutes: Annotated[float, typer.Option(min=0, help="Length in all, about; 0 keeps the recipe's steps.")] = 10,
) -> None:
    """Harvest docstrings, train with and without Stage I, measure, export and search."""
    resolved = resolve_recipe(recipe, set_, show)
    with extra("compare,search,gguf"):
        from anchorembed import demo as module

    with resumable():
        module.show(module.run(resolved, minutes), Console())


@app.command()
def compare(
    recipe: RecipeFile = None,
    set_: Set = None,
    show: Show = False,
    data: Annotated[Path | None, typer.Option(help="Folder that the recipe calls $ANCHOREMBED_DATA.")] = None,
    results: Annotated[Path | None, typer.Option(help="Results folder; by default in the output.")] = None,
    hours: Annotated[float | None, typer.Option(help="Start no run after so many hours.")] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Print what would be run, and stop.")] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Write the report from the results folder alone, and stop.")
    ] = False,
) -> None:
    """Train and evaluate with and without Stage I, side by side, with statistics and a report."""
    if data is not None:
        os.environ["ANCHOREMBED_DATA"] = str(data.resolve())
    if only_report and results is not None and not show:
        _write_report(results)
        return
    resolved = resolve_recipe(recipe, set_, show)
    folder = results or resolved.output / "results"
    if only_report:
        _write_report(folder)
        return
    with extra("compare"):
        import anchorembed.compare.report  # noqa: F401 - a missing package is reported now, not after hours
    from anchorembed.compare.plan import describe, open_comparison
    from anchorembed.compare.run import run

    changes = [part for change in set_ or [] for part in ("--set", change)]
    changes += ["--data", "DIR"] if "ANCHOREMBED_DATA" in os.environ else []
    repeat = shlex.join(["anchorembed", "compare", str(recipe), *changes, "--results", str(folder)])
    comparison = open_comparison(resolved, folder, repeat)
    say(describe(comparison))
    if only_plan:
        return
    with resumable():
        left = run(comparison, hours)
    _write_report(folder)
    if left:
        say(f"{left} runs are still to do. To continue: {typed_command()}")


@app.command(hidden=True)
def train_arm(recipe: Path) -> None:
    """Train an arm of a comparison: `compare` runs this command, and says what to type next."""
    from anchorembed.compare.controls import ArmRecipe
    from anchorembed.compare.controls import train_arm as run
    from anchorembed.train.loop import Interrupted

    try:
        run(read_as(ArmRecipe, recipe))
    except Interrupted as stop:
        fail(str(stop), 128 + stop.signal)
    except OutOfMemory as error:
        fail(str(error), 2)


def _write_report(folder: Path) -> None:
    """Write a comparison's report and print where it is."""
    with extra("compare"):
        from anchorembed.compare.report import write_report
    print_line("\n".join(map(str, write_report(folder))))
