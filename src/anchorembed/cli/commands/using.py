"""Commands that measure, use, and pass on a trained model."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from anchorembed.cli.options import DimensionsOption, ModelName, SideOption, Stored
from anchorembed.cli.root import app
from anchorembed.cli.terminal import print_json, print_line, say
from anchorembed.errors import extra


@app.command()
def evaluate(  # noqa: PLR0913, PLR0917 - the options of a verb
    model: ModelName,
    tasks: Annotated[list[str], typer.Argument(help="BEIR folders, test files or folders of them, or mteb's names.")],
    split: Annotated[str, typer.Option(help="Which qrels of a BEIR folder.")] = "test",
    instructions: Annotated[
        Path | None, typer.Option(help="YAML of `task, task type or default: instruction`.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fixed part of each task only.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for result files in mteb's form.")] = None,
    dimensions: Annotated[str, typer.Option(help="Smaller vectors, too: 256,128.")] = "",
    precision: Annotated[str, typer.Option(help="Other formats, too: float32,int8,binary.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a task a line.")] = False,
) -> None:
    """Measure a model on retrieval, reranking, similarity and classification tasks."""
    with extra("eval"):
        from anchorembed.evaluate.size_table import row, title
        from anchorembed.evaluate.tasks import TaskScore, read_instructions
    from anchorembed.api import evaluate as run
    from anchorembed.model.truncate_and_quantize import read_dimensions

    full: dict[str, TaskScore] = {}  # by task: the first score, which is that of the full vectors

    def show(score: TaskScore) -> None:
        if as_json:
            record = {"task": score.task, "type": score.kind, "metric": score.metric, "value": score.value}
            form = {"dimensions": score.form.dimensions, "precision": score.form.precision, "bytes": score.form.bytes}
            print_json(record | form)
        elif dimensions or precision:
            if score.task not in full:
                print_line(title(score))
            print_line(row(score, full.setdefault(score.task, score)))
        else:
            value = "undefined" if math.isnan(score.value) else f"{score.value:.4f}"
            print_line(f"{score.task:<32}{score.kind:<20}{score.metric:<12}{value}")

    run(
        model,
        tasks,
        split=split,
        instructions=read_instructions(instructions) if instructions else None,
        quick=quick,
        out=out,
        dimensions=read_dimensions(dimensions),
        precision=precision.split(",") if precision else (),
        on_score=show,
    )


@app.command()
def isotropy(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, hub ids, .gguf files.")],
    pairs: Annotated[str, typer.Option(help="File of pairs to embed, or hf://owner/name.")],
    most: Annotated[int, typer.Option(min=2, help="Pairs to take from its beginning.")] = 1000,
) -> None:
    """How evenly vectors fill their space: mean cosine, effective rank, alignment, uniformity."""
    from anchorembed.api import isotropy as run

    by_model = {model: asdict(measured) for model, measured in run(models, pairs, most=most).items()}
    print_line("".join(f"{name.replace('_', ' '):>16}" for name in next(iter(by_model.values()))) + "  model")
    for model, measured in by_model.items():
        print_line("".join(f"{value:16.4f}" for value in measured.values()) + f"  {model}")


@app.command()
def encode(  # noqa: PLR0913, PLR0917 - the options of a verb
    model: ModelName,
    texts: Annotated[Path, typer.Argument(help="JSONL with text and optional _id; or .txt, a text a line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Parquet file to write.")],
    side: SideOption = "document",
    instruction: Annotated[str | None, typer.Option(help="Task put before each text.")] = None,
    dimensions: DimensionsOption = None,
    precision: Annotated[Stored | None, typer.Option(help="How vectors are stored; default float32.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Parquet file to take dimensions, precision and ranges from."),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray is for many machines, and writes a folder of parts.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="For ray; default one a GPU.")] = None,
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
    print_line(f"{count} vectors: {out}")


@app.command()
def search(
    model: ModelName,
    corpus: Annotated[Path, typer.Argument(help="JSONL with _id, optional title, and text.")],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: Annotated[Path | None, typer.Option(help="Index folder; by default in the cache.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Hits to show.")] = 10,
    dimensions: DimensionsOption = None,
    precision: Annotated[Stored, typer.Option(help="How the index stores vectors.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a hit a line.")] = False,
) -> None:
    """Search a corpus by meaning."""
    from anchorembed.api import search as run

    result = run(model, corpus, query, index=index, top_k=top_k, dimensions=dimensions, precision=precision)
    say(f"index {'reused' if result.reused else 'built'}: {result.index}")
    for hit in result.hits:
        record = {"rank": hit.rank, "score": round(hit.score, 6), "id": hit.id, "text": hit.text}
        line = f"{hit.rank:>3}  {hit.score:.4f}  {hit.id}  {' '.join(hit.text.split())[:100]}"
        print_json(record) if as_json else print_line(line)


@app.command()
def read(
    model: ModelName,
    text: Annotated[str | None, typer.Argument(help="Text to embed and read.")] = None,
    other: Annotated[str | None, typer.Option(help="Text to compare with; by default a neutral one.")] = None,
    side: SideOption = "document",
    vectors: Annotated[Path | None, typer.Option(help="Read a vector of this Parquet file instead.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Which vector of the file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a vector says: its likeliest words, and what the decoder writes from it alone."""
    from anchorembed.api import read as run

    reading = run(model, text, vectors=vectors, id_=id_, side=side, **({} if other is None else {"other": other}))
    if as_json:
        print_json(asdict(reading) | {"is_read": reading.is_read})
        return
    for title, contents in (("the vector", reading.own), (f"that of {reading.other!r}", reading.against)):
        words = ", ".join(f"{word} {100 * share:.2g} %" for word, share in contents.words)
        print_line(f"{title}\n  likeliest words: {words}\n  the decoder writes: {contents.writes!r}")
    print_line(reading.verdict)


@app.command()
def page(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run, or its recipe.")],
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs not trained on; default: those the recipe holds out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: page.html in the output folder.")] = None,
) -> None:
    """Write a page of what training did: scores, curves, searches, maps of vectors, what a vector says."""
    from anchorembed.api import page as write

    print_line(str(write(run, pairs=pairs, out=out)))


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
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the model hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; by default private.")] = False,
) -> None:
    """Write a model for other software, reloaded there and compared with ours."""
    from anchorembed.export.push import check_repository, push
    from anchorembed.export.run import export as run
    from anchorembed.export.run import find_form

    if repository is not None:
        check_repository(repository)
    smallest = run(model, out, to=to, dtype=dtype, title=repository or "")
    print_line(f"{out}: loads in {find_form(to).engine}, cosine to ours at least {smallest:.6f}")
    if repository is not None:
        print_line(push(out, repository, public=public))


@app.command()
def verify(  # noqa: PLR0913, PLR0917 - the options of a verb
    model: ModelName,
    target: Annotated[
        str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible endpoint; or, for --with, an exported folder.")
    ],
    library: Annotated[
        Literal["langchain", "llamaindex", "sentence-transformers"] | None,
        typer.Option("--with", help="Load a folder with this library, with its defaults."),
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the served model; default the first listed.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=0.001, max=86_400, help="Seconds to wait for each reply.")] = 60.0,
    skip: Annotated[list[str] | None, typer.Option(help="A probe to leave out.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="prompts.json of an export to GGUF, to send with each text.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the vectors of a served model with the model's own, and say why they differ; exit code 1 if they do."""
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
        prompts=prompts,
    )
    print_json(asdict(report) | {"agrees": report.agrees}) if as_json else print_line(table(report))
    if not report.agrees:
        raise SystemExit(1)
