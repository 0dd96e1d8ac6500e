"""Train text embedders from decoder-only LLMs, measure them, and use them.

A fault that you can mend is printed alone, with exit code 2.
"""

import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import anchorembed
from anchorembed.config import Recipe
from anchorembed.errors import LESS_MEMORY, InputError, OutOfMemory, extra, first_line, memory_ended
from anchorembed.recipe import read_as, read_recipe, show_config
from anchorembed.system.files import to_json


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run a command; one that is stopped says so, where Typer prints nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail(f"Stopped. Nothing that was finished is lost. To continue: {_command()}", 130)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

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


class _Messages(logging.Handler):
    """Prints what the package logs to standard error: the messages alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's message."""
        _say(record.getMessage())


_MESSAGES = _Messages()


def _print_version(asked: bool) -> None:
    if asked:
        _print(anchorembed.__version__)
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
    logger.addHandler(_MESSAGES)
    _MESSAGES.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _print_prompt(asked: bool) -> None:
    """Print the prompt by which `fit` has queries written, and stop."""
    if asked:
        from anchorembed.curate.prompt import default_prompt

        _print(default_prompt().rstrip())
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeFile = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="File of pairs, instead of a recipe; several times for several.", show_default=False),
    ] = None,
    base: Annotated[str | None, typer.Option(help="With --pairs: the model to start from.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --pairs: folder of recipe and models.")
    ] = None,
    set_: Set = None,
    show: Show = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train the stages, and say whether it helped; finished ones are skipped, interrupted ones resumed."""
    if pairs or base or output:
        resolved = _of_pairs(recipe, pairs, base, output, [*(set_ or ()), *_skipping(skip_bad)], show)
    else:
        resolved = _resolve(recipe, set_, show, skip_bad)
    if resolved is None:
        return
    from anchorembed.train import run as training

    with _resumable():
        training.train(resolved)


@app.command()
def reconstruct(recipe: RecipeFile = None, set_: Set = None, show: Show = False, skip_bad: SkipBad = False) -> None:
    """Train Stage I alone: reconstruct each side of a pair from the other's anchor."""
    resolved = _resolve(recipe, set_, show, skip_bad)
    if resolved is None:
        return
    from anchorembed.train import run as training

    with _resumable():
        training.reconstruct(resolved)


@app.command()
def contrast(recipe: RecipeFile = None, set_: Set = None, show: Show = False, skip_bad: SkipBad = False) -> None:
    """Train Stage II alone: contrastive learning, from the Stage I model if it is complete."""
    resolved = _resolve(recipe, set_, show, skip_bad)
    if resolved is None:
        return
    from anchorembed.train import run as training

    with _resumable():
        training.contrast(resolved)


@app.command()
def demo(
    recipe: RecipeFile = None,
    set_: Set = None,
    show: Show = False,
    minutes: Annotated[float, typer.Option(min=0, help="About so long in all; 0 keeps the recipe's steps.")] = 10,
) -> None:
    """Harvest docstrings, train with and without Stage I, measure, export and search."""
    resolved = _resolve(recipe, set_, show, skip_bad=False)
    if resolved is None:
        return
    with extra("compare,search,gguf"):
        from anchorembed import demo as module

    with _resumable():
        module.show(module.run(resolved, minutes), Console())


@app.command()
def fit(  # noqa: PLR0913, PLR0917 - a command's options
    corpus: Annotated[Path, typer.Argument(help="JSONL with text, and _id or not; or .txt, a text a line.")],
    base: Annotated[str, typer.Option(help="Model to start from, and to write queries with.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of data, recipe and models.")],
    writer: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible endpoint to write with; key: $ANCHOREMBED_WRITER_KEY."),
    ] = None,
    writer_model: Annotated[str | None, typer.Option(help="The endpoint's name of its model.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="File of the prompt.", show_default=False)] = None,
    print_prompt: Annotated[
        bool, typer.Option("--print-prompt", callback=_print_prompt, is_eager=True, help="Print the default prompt.")
    ] = False,
    queries: Annotated[int, typer.Option(help="Queries of a document.")] = 2,
    temperature: Annotated[float, typer.Option(help="Of the writer; 0 is greedy.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the writer.")] = 0,
    found_in: Annotated[int, typer.Option(help="Keep a query that finds its document in the first so many.")] = 10,
    found_by: Annotated[str, typer.Option(help="bm25, or a model, by which it must.")] = "bm25",
    held_out: Annotated[int, typer.Option(help="Documents to test on, at most a fifth.")] = 200,
    set_: Set = None,
) -> None:
    """Write queries for documents that have none, train on them, and say whether it helped."""
    with extra("eval,mine"):
        import bm25s  # noqa: F401 - what it needs is missed now, not after hours

        import anchorembed.evaluate.find  # noqa: F401 - as above
    from anchorembed import fit as module

    writing = module.Writing(writer, writer_model, prompt, queries, temperature, seed, found_by, found_in, held_out)
    with _resumable():
        _print(str(module.fit(corpus, base, output, writing=writing, overrides=set_ or ())))


@app.command()
def evaluate(  # noqa: PLR0913, PLR0917 - the options of a verb
    model: ModelName,
    tasks: Annotated[list[str], typer.Argument(help="BEIR folders, test files or folders of them, or mteb's names.")],
    split: Annotated[str, typer.Option(help="Which qrels of a BEIR folder.")] = "test",
    instructions: Annotated[
        Path | None, typer.Option(help="YAML of `task, task type or default: instruction`.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fixed part of each task only.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for result files in mteb's form.", show_default=False)
    ] = None,
    dimensions: Annotated[str, typer.Option(help="Smaller vectors, too: 256,128.", show_default=False)] = "",
    precision: Annotated[str, typer.Option(help="And stored so: float32,int8,binary.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a task a line.")] = False,
) -> None:
    """Measure a model on retrieval, reranking, similarity and classification tasks."""
    with extra("eval"):
        from anchorembed.evaluate.sizes import row, title
        from anchorembed.evaluate.tasks import TaskScore, read_instructions
    from anchorembed.api import evaluate as run
    from anchorembed.model.smaller import read_dimensions

    whole: dict[str, TaskScore] = {}  # by task; what it is first scored with

    def show(score: TaskScore) -> None:
        if as_json:
            record = {"task": score.task, "type": score.kind, "metric": score.metric, "value": score.value}
            form = {"dimensions": score.form.dimensions, "precision": score.form.precision, "bytes": score.form.bytes}
            _print_json(record | form)
        elif dimensions or precision:
            if score.task not in whole:
                _print(title(score))
            _print(row(score, whole.setdefault(score.task, score)))
        else:
            value = "undefined" if math.isnan(score.value) else f"{score.value:.4f}"
            _print(f"{score.task:<32}{score.kind:<20}{score.metric:<12}{value}")

    told = read_instructions(instructions) if instructions else None
    run(
        model,
        tasks,
        split=split,
        instructions=told,
        quick=quick,
        out=out,
        dimensions=read_dimensions(dimensions),
        precision=precision.split(",") if precision else (),
        on_score=show,
    )


@app.command()
def compare(
    recipe: RecipeFile = None,
    set_: Set = None,
    show: Show = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder that the recipe calls $ANCHOREMBED_DATA.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Results folder; by default in the output.", show_default=False)
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Start no run after so many hours.", show_default=False)] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what is to be run, and stop.")] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Write the report anew from the results folder alone, and stop.")
    ] = False,
) -> None:
    """Train and evaluate with and without Stage I, side by side, with statistics and a report."""
    if data is not None:
        os.environ["ANCHOREMBED_DATA"] = str(data.resolve())
    if only_report and results is not None and not show:
        _write_report(results)
        return
    resolved = _resolve(recipe, set_, show, skip_bad=False)
    if resolved is None:
        return
    folder = results or resolved.output / "results"
    if only_report:
        _write_report(folder)
        return
    with extra("compare"):
        import anchorembed.compare.report  # noqa: F401 - what it needs is missed now, not after hours
    from anchorembed.compare.plan import describe, open_comparison
    from anchorembed.compare.run import run

    changes = [part for change in set_ or [] for part in ("--set", change)]
    changes += ["--data", "DIR"] if "ANCHOREMBED_DATA" in os.environ else []
    repeat = shlex.join(["anchorembed", "compare", str(recipe), *changes, "--results", str(folder)])
    comparison = open_comparison(resolved, folder, repeat)
    _say(describe(comparison))
    if only_plan:
        return
    with _resumable():
        left = run(comparison, hours)
    _write_report(folder)
    if left:
        _say(f"{left} runs are still to do. To continue: {_command()}")


@app.command(hidden=True)
def train_arm(recipe: Path) -> None:
    """Train an arm of a comparison, which starts this itself, and says what to type next."""
    from anchorembed.compare.controls import ArmRecipe
    from anchorembed.compare.controls import train_arm as run
    from anchorembed.train.loop import Interrupted

    try:
        run(read_as(ArmRecipe, recipe))
    except Interrupted as stop:
        _fail(str(stop), 128 + stop.signal)
    except OutOfMemory as error:
        _fail(str(error), 2)


@app.command()
def check(
    recipe: RecipeFile = None,
    set_: Set = None,
    tests: Annotated[
        list[Path] | None,
        typer.Option("--test", help="BEIR folder, test file or folder of them whose texts should not be trained on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a source a line.")] = False,
) -> None:
    """Look at a recipe's pairs: counts, lengths, cut and dropped ones, duplicates, texts of tests, with examples."""
    resolved = _resolve(recipe, set_, show=False, skip_bad=False)
    if resolved is None:
        return
    from dataclasses import asdict

    from anchorembed.api import check as run
    from anchorembed.curate.check import report

    for source in run(resolved, tests or ()):
        _print_json(asdict(source)) if as_json else _print(report(source))


@app.command()
def mine(  # noqa: PLR0913, PLR0917 - each an option
    pairs: Annotated[str, typer.Argument(help="File or folder of pairs, or hf://owner/name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSONL to write; gzipped if it ends in .gz.")],
    by: Annotated[str, typer.Option(help="bm25, or a model as in evaluate.")] = "bm25",
    corpus: Annotated[
        Path | None, typer.Option(help="Corpus to mine from, besides the positives.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(help="Negatives of each pair.")] = 1,
    ranks: Annotated[tuple[int, int], typer.Option(help="First and last rank to take from.")] = (1, 100),
    margin: Annotated[float, typer.Option(help="Leave out what scores above this share of the positive's.")] = 0.95,
    rerank: Annotated[
        str | None, typer.Option(help="Cross-encoder that scores what is found anew.", show_default=False)
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Mine hard negatives by BM25 or with a model, and score them anew with a cross-encoder."""
    from anchorembed.api import mine as run
    from anchorembed.curate.mine import Rules

    rules = Rules(count, *ranks, margin)
    mined = run(pairs, out, by=by, corpus=corpus, rules=rules, rerank=rerank, skip_bad=skip_bad)
    for number, many in sorted(mined.by_negatives.items()):
        _print(f"{many:>9,} pairs with {number} mined")
    for reason, many in mined.dropped.items():
        _print(f"{many:>9,} candidates left out: {reason}")
    _print(str(out))


@app.command()
def isotropy(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, hub ids, .gguf files.")],
    pairs: Annotated[str, typer.Option(help="File of pairs to embed, or hf://owner/name.")],
    most: Annotated[int, typer.Option(min=2, help="Pairs to take from its beginning.")] = 1000,
) -> None:
    """How evenly vectors fill their space: mean cosine, effective rank, alignment, uniformity."""
    from dataclasses import asdict

    from anchorembed.api import isotropy as run

    by_model = {model: asdict(measured) for model, measured in run(models, pairs, most=most).items()}
    _print("".join(f"{name.replace('_', ' '):>16}" for name in next(iter(by_model.values()))) + "  model")
    for model, measured in by_model.items():
        _print("".join(f"{value:16.4f}" for value in measured.values()) + f"  {model}")


@app.command()
def encode(  # noqa: PLR0913, PLR0917 - the options of a verb
    model: ModelName,
    texts: Annotated[Path, typer.Argument(help="JSONL with text, and _id or not; or .txt, a text a line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Parquet file to write.")],
    side: SideOption = "document",
    instruction: Annotated[str | None, typer.Option(help="Task put before each text.", show_default=False)] = None,
    dimensions: DimensionsOption = None,
    precision: Annotated[
        Stored | None, typer.Option(help="How vectors are stored; default float32.", show_default=False)
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Parquet file to take dimensions, precision and ranges from.", show_default=False),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray is for many machines, and writes a folder of parts.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Of ray; default one a GPU.", show_default=False)] = None,
) -> None:
    """Embed texts into Parquet with columns id and vector."""
    from anchorembed.api import encode as run

    count = run(
        model,
        texts,
        out,
        side=side,
        instruction=instruction,
        dimensions=dimensions,
        precision=precision,
        like=like,
        engine=engine,
        workers=workers,
    )
    _print(f"{count} vectors: {out}")


@app.command()
def search(
    model: ModelName,
    corpus: Annotated[Path, typer.Argument(help="JSONL with _id, optional title, and text.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: Annotated[
        Path | None, typer.Option(help="Index folder; by default in the cache.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Hits to show.")] = 10,
    dimensions: DimensionsOption = None,
    precision: Annotated[Stored, typer.Option(help="How the index stores vectors.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a hit a line.")] = False,
) -> None:
    """Search a corpus by meaning."""
    from anchorembed.api import search as run

    result = run(model, corpus, query, index=index, top_k=top_k, dimensions=dimensions, precision=precision)
    _say(f"index {'reused' if result.reused else 'built'}: {result.index}")
    for hit in result.hits:
        record = {"rank": hit.rank, "score": round(hit.score, 6), "id": hit.id, "text": hit.text}
        line = f"{hit.rank:>3}  {hit.score:.4f}  {hit.id}  {' '.join(hit.text.split())[:100]}"
        _print_json(record) if as_json else _print(line)


@app.command()
def read(
    model: ModelName,
    text: Annotated[str | None, typer.Argument(help="Text to embed and read.", show_default=False)] = None,
    other: Annotated[
        str | None, typer.Option(help="Text to compare with; by default a neutral one.", show_default=False)
    ] = None,
    side: SideOption = "document",
    vectors: Annotated[
        Path | None, typer.Option(help="Read a vector of this Parquet file instead.", show_default=False)
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Which vector of the file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a vector says: its likeliest words, and what the decoder writes from it alone."""
    from dataclasses import asdict

    from anchorembed.api import read as run

    reading = run(model, text, vectors=vectors, id_=id_, side=side, **({} if other is None else {"other": other}))
    if as_json:
        _print_json(asdict(reading) | {"is_read": reading.is_read})
        return
    for title, said in (("the vector", reading.own), (f"that of {reading.other!r}", reading.against)):
        words = ", ".join(f"{word} {100 * share:.2g} %" for word, share in said.words)
        _print(f"{title}\n  likeliest words: {words}\n  the decoder writes: {said.writes!r}")
    _print(reading.verdict)


@app.command()
def page(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run, or its recipe.")],
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs not trained on; default: those the recipe holds out.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: page.html in the output folder.", show_default=False)
    ] = None,
) -> None:
    """Write a page of what training did: scores, curves, searches, maps of vectors, what a vector says."""
    from anchorembed.api import page as write

    _print(str(write(run, pairs=pairs, out=out)))


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Literal["folder", "gguf", "openvino", "onnx"],
        typer.Option(help="Form; folder: sentence-transformers', which most servers read."),
    ] = "folder",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    repository: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the model hub.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let all see a new repository; by default private.")] = False,
) -> None:
    """Write a model for other software, reloaded there and compared with ours."""
    from anchorembed.export.push import check_repository, push
    from anchorembed.export.run import export as run
    from anchorembed.export.run import find_form

    if repository is not None:
        check_repository(repository)
    smallest = run(model, out, to=to, dtype=dtype, title=repository or "")
    _print(f"{out}: loads in {find_form(to).engine}, cosine to ours at least {smallest:.6f}")
    if repository is not None:
        _print(push(out, repository, public=public))


@app.command()
def verify(
    model: ModelName,
    target: Annotated[
        str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible endpoint; with --with an exported folder.")
    ],
    library: Annotated[
        Literal["langchain", "llamaindex", "sentence-transformers"] | None,
        typer.Option("--with", help="Load a folder with this library, with its defaults.", show_default=False),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="Name of the served model; default the first listed.", show_default=False)
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=0.001, max=86_400, help="Seconds to wait for each reply.")] = 60.0,
    skip: Annotated[list[str] | None, typer.Option(help="A probe to leave out.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what serves a model with the model, and name why vectors differ; the exit code is 1 if they do."""
    from dataclasses import asdict

    from anchorembed.export.verify import table
    from anchorembed.export.verify import verify as run

    report = run(
        model,
        target,
        library=library,
        served_name=served_name,
        api_key_env=api_key_env,
        timeout=timeout,
        skip=skip or [],
    )
    _print_json(asdict(report) | {"agrees": report.agrees}) if as_json else _print(table(report))
    if not report.agrees:
        raise SystemExit(1)


@app.command()
def profile(
    recipe: RecipeFile = None,
    set_: Set = None,
    stage: Annotated[Literal["reconstruct", "contrast", "both"], typer.Option(help="Which.")] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps a stage, after 2 to warm up.")] = 5,
) -> None:
    """Run a few steps of a recipe: tokens a second, memory, share of the machine's peak, where the time goes."""
    resolved = _resolve(recipe, set_, show=False, skip_bad=False)
    if resolved is None:
        return
    from anchorembed.train.profile import profile as run
    from anchorembed.train.profile import report

    if stage != "contrast" and (resolved.reconstruct is not None or stage == "reconstruct"):
        _print(report(run(resolved, "reconstruct", steps)))
    if stage != "reconstruct" and (resolved.contrast is not None or stage == "contrast"):
        _print(report(run(resolved, "contrast", steps)))


def main() -> None:
    """Run the command line; the exit code is 2 for faults a user can mend, 130 or 143 when stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot print is no traceback
    try:
        app(standalone_mode=True)
    except OutOfMemory as error:
        _fail(f"{error} To continue: {_command()}", 2)
    except InputError as error:
        _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not memory_ended(error):
            raise
        _fail(f"There is not enough memory: {first_line(error)} {LESS_MEMORY}", 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}. Check the path, its rights and the disk.", 2)


def _write_report(folder: Path) -> None:
    """Write a comparison's report and print where it is."""
    with extra("compare"):
        from anchorembed.compare.report import write_report
    _print("\n".join(map(str, write_report(folder))))


@contextmanager
def _resumable() -> Iterator[None]:
    """Where what runs within is stopped, print the command that continues it; exit code 128 + the signal's number."""
    from anchorembed.system.processes import leave
    from anchorembed.train.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        leave()
        _fail(f"{stop} To continue: {_command()}", 128 + stop.signal)
    leave()


def _resolve(path: Path | None, overrides: list[str] | None, show: bool, skip_bad: bool) -> Recipe | None:
    """Read the recipe, or print the configuration and return None."""
    if path is None:
        if not show:
            raise InputError(
                "a recipe is needed, such as recipes/demo.yaml, or train --pairs. --show-config prints every key."
            )
        _print(show_config())
        return None
    recipe = read_recipe(path, [*(overrides or ()), *_skipping(skip_bad)])
    if show:
        _print(show_config(recipe))
        return None
    return recipe


def _of_pairs(
    recipe: Path | None, pairs: list[str] | None, base: str | None, output: Path | None, set_: list[str], show: bool
) -> Recipe | None:
    """Make the recipe of some pairs, or print its configuration and return None."""
    if recipe is not None or not pairs or base is None or output is None:
        raise InputError("give a recipe, or else all of --pairs FILE, --base MODEL and --output DIR.")
    from anchorembed.model.load import load_config
    from anchorembed.train.default_recipe import recipe_of_pairs
    from anchorembed.train.kept_recipe import check_kept

    made = recipe_of_pairs(pairs, base, output, set_)
    load_config(base)
    if show:
        _print(show_config(made))
        return None
    check_kept(made)
    return made


def _skipping(skip_bad: bool) -> list[str]:
    """The override by which unusable lines are dropped."""
    return ["data.skip_bad=true"] if skip_bad else []


def _command() -> str:
    """What was typed; of several processes, what their launcher is to start again."""
    command = shlex.join(["anchorembed", *sys.argv[1:]])
    return command if os.environ.get("WORLD_SIZE", "1") == "1" else f"the same launcher with -m {command}"


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, highlight=False, markup=False)


def _print_json(record: Mapping[str, object]) -> None:
    """Print a record as JSON, with escapes where the terminal cannot print its characters."""
    text = to_json(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = to_json(record)
    _print(text)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")  # typer.echo would write UTF-8 to what says it is ASCII
    sys.stdout.flush()


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(message, style="bold red", highlight=False, markup=False)
    raise SystemExit(code)
