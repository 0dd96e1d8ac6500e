"""The demo: harvest docstrings, train with and without Stage I, measure on held-out packages, export, search.

It is sized to take a given number of minutes on this machine: Stage II by the time of first steps; then Stage I, and
the number of documents to measure on, by the time that is left. The sizes are kept in the output folder, so that an
interrupted demo continues with them. What an earlier run has finished is reused, and a message says so.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anchorembed.curate.harvest import Harvest, harvest_docstrings
from anchorembed.data.beir import Collection, read_collection
from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import METRICS, chance
from anchorembed.evaluate.quick import subset
from anchorembed.evaluate.task_types import evaluate_collection
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import read_metadata, saved_sha256
from anchorembed.model.tokens import Lengths
from anchorembed.page.contents import Page, cached_encoder, contents
from anchorembed.page.html import write_page
from anchorembed.recipe_schema import Recipe
from anchorembed.search.index import Hit, open_or_build
from anchorembed.system.files import hash_texts, to_json, write_file, write_jsonl
from anchorembed.system.progress import bars_on_terminals_only, counting_bar, progress_bar
from anchorembed.train.clock import Clock, Sizing, read_sizing
from anchorembed.train.loop import read_log
from anchorembed.train.run import STAGES, contrast, reconstruct
from anchorembed.train.step_times import measure
from anchorembed.train.time_budget import ENOUGH, Sizes, fitting_sizes, resized

_log = logging.getLogger(__name__)

DOCUMENTS = 500  # that the models are measured on, at most
CLEARLY = 5.0  # times chance
SIZES = "sizes.json"
_ALONE = "contrastive-only"  # folder of the arm without Stage I, which is trained first
_EMBEDDINGS = 7  # texts embedded for each of the documents: with its query by three models, in the index, on the map
_LOADS = 28  # loads of a model that take as long as all loads, the page's readings and the export
_MEASURED = 32  # documents embedded to see how long that takes


@dataclass(frozen=True, slots=True)
class ModelScores:
    """A row of the table: mean scores, and the SHA-256 of the weights; chance has no weights."""

    means: dict[str, float]
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the last screen shows; ``longer`` are the minutes to ask for to train longer, None if it was not sized."""

    collection: Collection
    rows: dict[str, ModelScores]
    searches: list[tuple[str, list[Hit]]]
    exported: Path
    run: Path
    models: dict[str, str]
    minutes: float = 0.0
    longer: int | None = None
    page: Path | None = None


def run(recipe: Recipe, minutes: float) -> DemoResult:
    """The whole demo, in about ``minutes`` minutes: harvest, size, train, measure and write the page.

    With 0 minutes the stages have the recipe's steps.

    Raises:
        InputError: as `demo` does, and if the output folder was begun with other minutes.
    """
    started = time.monotonic()
    _check(recipe)
    with bars_on_terminals_only():
        harvested = harvest(recipe.output)
        clock = size(recipe, harvested, minutes, started)
        result = demo(recipe, harvested, clock)
        page = write_page(page_of(result), recipe.output / "page.html")
    sizing = clock.sizing if clock else None
    longer = sizing.minutes_for(2 * max(ENOUGH, sizing.sizes.contrast_steps)) if sizing else None
    return replace(result, page=page, longer=longer, minutes=(time.monotonic() - started) / 60)


def harvest(output: Path) -> Harvest:
    """Make or reuse the docstring pairs of this Python."""
    with progress_bar() as bar:
        task = bar.add_task("reading packages", total=None, note="")
        harvested = harvest_docstrings(
            output / "data", progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    word = "reused" if harvested.reused else "harvested"
    _log.info(
        f"data: {harvested.counts.train} docstring pairs {word}, {harvested.counts.held_out} held out from "
        f"{len(harvested.held_out_packages)} whole packages: {harvested.folder}"
    )
    return harvested


def size(recipe: Recipe, harvested: Harvest, minutes: float, started: float) -> Clock | None:
    """Measure first steps and size the demo, or read how it was sized when it was begun; None for 0 minutes.

    Raises:
        InputError: if it was begun with other minutes, or the file that says so is damaged.
    """
    path = recipe.output / SIZES
    saved = read_sizing(path) if path.exists() else None
    is_begun = (recipe.output / _ALONE).exists()
    asked = saved.asked if saved else 0 if is_begun else minutes
    if asked != minutes:
        raise InputError(
            f"{recipe.output}: its demo was begun with --minutes {asked:g}, not {minutes:g}. Give that, "
            "delete the folder, or choose another: --set output=DIR"
        )
    if minutes <= 0:
        return None
    if saved:
        _log.info(f"sizes: as this demo was begun: {_described(recipe, saved)}")
        return Clock(path, saved, time.monotonic() - saved.spent)
    texts = [document.text for document in list(read_collection(harvested.collection).documents)[:_MEASURED]]
    with _training_quiet():
        times, pairs = measure(_with_data(recipe, harvested), texts, _EMBEDDINGS, _LOADS)
    epochs = [max(1, pairs // stage.batch_size) for stage in (recipe.reconstruct, recipe.contrast) if stage]
    most = Sizes(epochs[0], epochs[1], DOCUMENTS)
    begun = time.monotonic() - started
    sizing = Sizing(minutes, fitting_sizes(60 * minutes - begun, times, most), times, most, begun, begun)
    clock = Clock(path, sizing, started)
    clock.write()
    _log.info(f"sizes: an estimate by the time of the first steps: {_described(recipe, sizing)}")
    if not sizing.sizes.is_enough:
        _log.warning(
            f"sizes: {sizing.sizes.contrast_steps} steps of Stage II are hardly enough to get clearly above chance; "
            f"--minutes {sizing.minutes_for(ENOUGH)} would be, on this machine."
        )
    return clock


def _described(recipe: Recipe, sizing: Sizing) -> str:
    sizes, stages = sizing.sizes, (recipe.reconstruct, recipe.contrast)
    pairs = [stage.batch_size if stage else 0 for stage in stages]
    return (
        f"about {sizing.minutes:.0f} minutes (asked: {sizing.asked:g}): {sizes.contrast_steps} steps of {pairs[1]} "
        f"pairs of Stage II, with and without Stage I; {sizes.reconstruct_steps} of {pairs[0]} of Stage I, measured on "
        f"{sizes.documents} documents"
    )


def _check(recipe: Recipe) -> None:
    """Refuse a recipe that does not train both stages, and an export that would replace something else."""
    for stage in STAGES:
        if recipe.stage(stage) is None:
            raise InputError(f"recipe: {stage} is null, and the demo shows both stages. Give it settings.")
    if recipe.contrast and recipe.contrast.from_ is not None:
        raise InputError("contrast.from: Stage II of the demo starts from Stage I. Leave it out, or set model.name.")
    exported = recipe.output / "export"
    if exported.exists() and read_metadata(exported) is None:
        raise InputError(f"{exported}: the demo exports to there, and this is no export of ours. Move it away.")


def _with_data(recipe: Recipe, harvested: Harvest) -> Recipe:
    """The recipe with the harvest as its only source."""
    source = recipe.data.sources[0].model_copy(update={"path": str(harvested.train)})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": [source]})})


def demo(recipe: Recipe, harvested: Harvest, clock: Clock | None = None) -> DemoResult:
    """Train a recipe on a harvest, with and without Stage I, and measure both on its held-out packages.

    Without a clock, the stages have the recipe's steps.

    Raises:
        InputError: if the recipe does not train both stages, or the export would replace something else.
    """
    _check(recipe)
    recipe = _with_data(recipe, harvested)
    alone = recipe.model_copy(update={"reconstruct": None, "output": recipe.output / _ALONE})
    contrastive = _trained(resized(alone, clock.sizing.sizes) if clock else alone, "contrastive only")
    if clock:
        recipe = resized(recipe, clock.arm_done(1, contrastive.parent / "log.jsonl"))
    anchored_model = _trained(recipe, "Stage I + contrastive")
    documents = clock.arm_done(2, anchored_model.parent / "log.jsonl").documents if clock else DOCUMENTS
    collection = subset(read_collection(harvested.collection), documents)
    models = {
        "base model": recipe.model.name,
        "contrastive only": str(contrastive),
        "Stage I + contrastive": str(anchored_model),
    }
    rows = {"chance": ModelScores(chance(collection))}
    lengths = Lengths(recipe.data.query_tokens, recipe.data.document_tokens)
    for name, model in models.items():
        # The base model too is cut at the recipe's lengths: the rows must differ in training alone.
        embedder = Embedder.load(model, lengths=lengths)
        rows[name] = _measure(recipe.output / "evaluation" / f"{name.replace(' ', '-')}.json", embedder, collection)
    exported = recipe.output / "export"
    if exported.exists() and saved_sha256(exported) == saved_sha256(anchored_model):
        _log.info(f"export: kept: {exported}")
    else:
        shutil.rmtree(exported, ignore_errors=True)
        _log.info(f"export: {exported}, cosine to ours at least {export(anchored_model, exported):.6f}")
    searches = _searches(anchored_model, collection, recipe.output / "index")
    return DemoResult(collection, rows, searches, exported, recipe.output, models)


def page_of(result: DemoResult) -> Page:
    """The page of a demo."""
    output, models = result.run, result.models
    base, contrastive, anchored = models
    shown = {
        base: models[base],
        contrastive: models[contrastive],
        "Stage I": str(output / "reconstruct" / "model"),
        anchored: models[anchored],
    }
    notes = [
        f"{len(result.collection.queries)} queries and {len(result.collection.documents)} documents of Python packages "
        "that were not trained on. Stage I comes on top of Stage II: the last two rows differ in compute, too."
    ]
    rows = {name: row.means for name, row in result.rows.items()}
    logs = {contrastive: output / _ALONE, anchored: output}
    lengths = Embedder.load(models[anchored]).metadata.lengths
    return contents(
        "AnchorEmbed's demo", notes, shown, result.collection, rows, logs, partial(Embedder.load, lengths=lengths)
    )


def show(result: DemoResult, console: Console) -> None:
    """Print the last screen: table, searches, paths."""
    print_text = partial(console.print, highlight=False, markup=False, emoji=False)
    size = f"{len(result.collection.queries)} queries, {len(result.collection.documents)} documents"
    table = Table(title=f"Held-out packages: {size}", title_justify="left")
    table.add_column("")
    table.add_column("weights")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    for name, row in result.rows.items():
        table.add_row(name, row.weights_sha256[:12], *(f"{row.means[metric]:.3f}" for metric in METRICS))
    console.print(table)
    best = max(result.rows[name].means["nDCG@10"] for name in ("contrastive only", "Stage I + contrastive"))
    times = best / result.rows["chance"].means["nDCG@10"]
    if times < CLEARLY:
        longer = f"--minutes {result.longer} --set output={result.run}-longer" if result.longer else "more steps"
        print_text(
            f"No trained row is clearly above chance (best {times:.1f} x, wanted {CLEARLY:.0f} x). Train longer, with "
            f"{longer}; or anchorembed demo recipes/docstrings.yaml --minutes 0, some hours on 2 cores.",
            soft_wrap=True,
        )
    for query, hits in result.searches:
        print_text(f"\n{query}", style="bold")
        for hit in hits:
            snippet = " ".join(hit.text.split())[:90]
            print_text(f"  {hit.rank}. {hit.score:.3f}  {hit.id}: {snippet}")
    paths = f"\nexported model: {result.exported}\nrun folder:     {result.run}\ntook {result.minutes:.1f} minutes"
    page = f"\npage to look at: {result.page.resolve().as_uri()}" if result.page else ""
    print_text(f"{paths}{page}", soft_wrap=True)


@contextmanager
def _training_quiet() -> Iterator[None]:
    """Hide what training and its data log below warnings: the demo logs a line for each stage."""
    loggers = [logging.getLogger(f"anchorembed.{name}") for name in ("data", "train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trained(recipe: Recipe, name: str) -> Path:
    """Train the recipe's stages, and log a line for each; returns the last model's folder."""
    model = recipe.output
    for stage, run_stage in zip(STAGES, (reconstruct, contrast), strict=True):
        settings = recipe.stage(stage)
        if settings is None:
            continue
        folder = recipe.output / stage
        is_kept = (folder / "model").exists()
        with _training_quiet():
            model = run_stage(recipe)
        outcome = f"finished before, kept: {model}" if is_kept else _summary(folder / "log.jsonl", settings.batch_size)
        _log.info(f"{name}: {stage}: {outcome}")
    return model


def _summary(log: Path, pairs: int) -> str:
    """A finished stage in a line."""
    entries = read_log(log)
    titles = {"held_out_accuracy": "accuracy on held-out pairs", "gain_d2q": "anchor gain of queries"}
    latest = {key: entry[key] for entry in entries for key in titles if key in entry}
    measured = "".join(f", {title} {latest[key]:.3f}" for key, title in titles.items() if key in latest)
    minutes = sum(entry["seconds"] for entry in entries) / 60
    loss = f"loss {entries[0]['loss']:.3f} to {entries[-1]['loss']:.3f}"
    return f"{len(entries)} steps of {pairs} pairs in {minutes:.1f} minutes, {loss}{measured}"


def _measure(path: Path, embedder: Embedder, collection: Collection) -> ModelScores:
    """Score a model on the collection; scores of the same model and collection are read from the file ``path``."""
    content = repr((tuple(collection.documents), collection.queries, sorted(collection.qrels.items())))
    key = {
        "model": embedder.fingerprint,
        "weights_sha256": embedder.weights_sha256,
        "collection_sha256": hash_texts([content]),
    }
    means: dict[str, float] | None = None
    with suppress(OSError, ValueError, LookupError, TypeError):  # there are none, or the file is damaged
        saved = json.loads(path.read_text(encoding="utf-8"))
        means = saved["mean"] if saved["key"] == key else None
    origin = "reused: " if means else ""
    if not means:
        texts = len(collection.documents) + len(collection.queries)
        with counting_bar(f"embedding {collection.name}", texts) as advance:
            means = evaluate_collection(cached_encoder(embedder, advance), collection)
        write_file(path, to_json({"key": key, "mean": means}, indent=2))
    _log.info(f"evaluation: nDCG@10 {means['nDCG@10']:.3f}: {origin}{path}")
    return ModelScores(means, embedder.weights_sha256)


def _searches(model: Path, collection: Collection, folder: Path) -> list[tuple[str, list[Hit]]]:
    """Three held-out queries, spread over the collection, with their top hits."""
    corpus = folder.parent / "corpus.jsonl"
    write_jsonl(corpus, ({"_id": document.id, "text": document.text} for document in collection.documents))
    embedder = Embedder.load(model)
    index, _ = open_or_build(embedder, corpus, folder)
    queries = collection.queries[:: max(1, len(collection.queries) // 3)][:3]
    return [(query.text, index.search(embedder, query.text, top_k=3)) for query in queries]
