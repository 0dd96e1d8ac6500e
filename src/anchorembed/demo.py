"""The demo: harvest docstrings, train with and without Stage I, measure on held-out packages, export, search.

What an earlier run made is reused, and a message says so.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anchorembed.api import score
from anchorembed.config import Recipe
from anchorembed.curate.harvest import Harvest, harvest_docstrings
from anchorembed.data.beir import Collection, read_collection
from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import METRICS, chance
from anchorembed.evaluate.quick import subset
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder, read_metadata, saved_sha256
from anchorembed.model.tokens import Lengths
from anchorembed.search.index import Hit, open_or_build
from anchorembed.system.files import hash_texts, to_json, write_file, write_jsonl
from anchorembed.system.progress import progress_bar
from anchorembed.train.run import STAGES, train

_log = logging.getLogger(__name__)

DOCUMENTS = 500  # that the models are measured on
CLEARLY = 5.0  # times chance


@dataclass(frozen=True, slots=True)
class ModelScores:
    """A row of the table: mean scores, and the SHA-256 of the weights; chance has no weights."""

    means: dict[str, float]
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the last screen shows."""

    collection: Collection
    rows: dict[str, ModelScores]
    searches: list[tuple[str, list[Hit]]]
    exported: Path
    run: Path
    minutes: float


def harvest(output: Path) -> Harvest:
    """Make or reuse the docstring pairs of this Python."""
    with progress_bar() as bar:
        task = bar.add_task("reading packages", total=None, note="")
        made = harvest_docstrings(
            output / "data", progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    word = "reused" if made.reused else "harvested"
    _log.info(
        f"data: {made.counts.train} docstring pairs {word}, {made.counts.held_out} held out from "
        f"{len(made.held_out_packages)} whole packages: {made.folder}"
    )
    return made


def demo(recipe: Recipe, made: Harvest) -> DemoResult:
    """Train a recipe on a harvest, with and without Stage I, and measure both on its held-out packages.

    Raises:
        InputError: if the recipe leaves a stage out, or the export would replace something else.
    """
    started = time.monotonic()
    for stage in STAGES:
        if recipe.stage(stage) is None:
            raise InputError(f"recipe: {stage} is null, and the demo shows both stages. Give it settings.")
    exported = recipe.output / "export"
    if exported.exists() and read_metadata(exported) is None:
        raise InputError(f"{exported}: the demo exports to there, and this is no export of ours. Move it away.")
    collection = subset(read_collection(made.collection), DOCUMENTS)
    source = recipe.data.sources[0].model_copy(update={"path": made.train})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": [source]})})
    contrastive_recipe = recipe.model_copy(update={"reconstruct": None, "output": recipe.output / "contrastive-only"})
    _log.info("--- contrastive only ---")
    contrastive_model = train(contrastive_recipe)
    _log.info("--- Stage I + contrastive ---")
    anchored_model = train(recipe)
    models = {
        "base model": recipe.model.name,
        "contrastive only": str(contrastive_model),
        "Stage I + contrastive": str(anchored_model),
    }
    rows = {"chance": ModelScores(chance(collection))}
    for name, model in models.items():
        # The base model too is cut at the recipe's lengths: the rows must differ in training alone.
        embedder = Embedder.load(model, lengths=Lengths(recipe.data.query_tokens, recipe.data.document_tokens))
        rows[name] = _measure(recipe.output / "evaluation" / f"{name.replace(' ', '-')}.json", embedder, collection)
    if exported.exists() and saved_sha256(exported) == saved_sha256(anchored_model):
        _log.info(f"export: kept: {exported}")
    else:
        shutil.rmtree(exported, ignore_errors=True)
        _log.info(f"export: {exported}, cosine to ours at least {export(anchored_model, exported):.6f}")
    searches = _searches(anchored_model, collection, recipe.output / "index")
    return DemoResult(collection, rows, searches, exported, recipe.output, (time.monotonic() - started) / 60)


def show(result: DemoResult, console: Console) -> None:
    """Print the last screen: table, searches, paths."""
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
        console.print(
            f"No trained row is clearly above chance (best {times:.1f} x, wanted {CLEARLY:.0f} x). Train longer: "
            "anchorembed demo recipes/docstrings.yaml takes some hours on 2 cores."
        )
    for query, hits in result.searches:
        console.print(f"\n{query}", style="bold", highlight=False, markup=False)
        for hit in hits:
            snippet = " ".join(hit.text.split())[:90]
            console.print(f"  {hit.rank}. {hit.score:.3f}  {hit.id}: {snippet}", highlight=False, markup=False)
    console.print(f"\nexported model: {result.exported}\nrun folder:     {result.run}", highlight=False, markup=False)
    console.print(f"took {result.minutes:.1f} minutes", highlight=False)


def _measure(path: Path, embedder: Embedder, collection: Collection) -> ModelScores:
    """Score a model on the collection; scores of the same model and collection are read from the file ``path``."""
    content = repr((tuple(collection.documents), collection.queries, sorted(collection.qrels.items())))
    key = {
        "model": embedder.fingerprint,
        "weights_sha256": embedder.weights_sha256,
        "collection_sha256": hash_texts([content]),
    }
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if saved.get("key") == key:
        _log.info(f"evaluation: reused: {path}")
        return ModelScores(saved["mean"], embedder.weights_sha256)
    scores = score(embedder, collection)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, to_json({"key": key, "mean": scores.mean}, indent=2))
    return ModelScores(scores.mean, embedder.weights_sha256)


def _searches(model: Path, collection: Collection, folder: Path) -> list[tuple[str, list[Hit]]]:
    """Three held-out queries, spread over the collection, with their top hits."""
    corpus = folder.parent / "corpus.jsonl"
    write_jsonl(corpus, ({"_id": document.id, "text": document.text} for document in collection.documents))
    embedder = Embedder.load(model)
    index, _ = open_or_build(embedder, corpus, folder)
    queries = collection.queries[:: max(1, len(collection.queries) // 3)][:3]
    return [(query.text, index.search(embedder, query.text, top_k=3)) for query in queries]
