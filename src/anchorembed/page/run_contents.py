"""The page of a run, from its output folder: the models of its stages, and the base model they started from."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.data.pairs import TextPair, folded, read_pairs
from anchorembed.data.sampling import split
from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import chance
from anchorembed.evaluate.task_types import evaluate_collection
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import read_metadata
from anchorembed.page.contents import Page, cached_encoder, contents
from anchorembed.recipe_file import read_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.kept_recipe import KEPT
from anchorembed.train.prepare import load_to_measure, open_pairs

_MOST = 500  # pairs to show
_STAGES = {"reconstruct": "Stage I", "contrast": "Stage II"}


def page_of_run(run: Path, pairs: Path | None = None) -> tuple[Page, Path]:
    """What the page of a run shows, and the run's output folder.

    With a recipe, models are loaded as the verdict of `train` loads them, so the base model has the same instruction.

    Args:
        run: output folder of a run, which holds its ``recipe.yaml``, or a recipe.
        pairs: file of pairs not trained on, of which 500 are shown; by default those that the recipe holds out.

    Raises:
        InputError: if there is no trained model, or fewer than 2 pairs to show.
    """
    recipe_file = run / KEPT if run.is_dir() else run
    recipe = read_recipe(recipe_file) if recipe_file.exists() or not run.is_dir() else None
    output = recipe.output if recipe and not run.is_dir() else run
    models = find_models(output)
    shown = _held_out(run, recipe) if pairs is None else list(islice(read_pairs(pairs), _MOST))
    collection = collection_of(shown)
    rows = {"chance": chance(collection)}
    trained = read_metadata(Path(list(models.values())[-1]))
    lengths = trained.lengths if trained else None  # the base model's texts are cut alike

    def load(model: str) -> Embedder:
        return load_to_measure(recipe, model, "auto") if recipe else Embedder.load(model, lengths=lengths)

    for name, model in models.items():
        rows[name] = evaluate_collection(cached_encoder(load(model)), collection)
    kind = "held-out queries" if pairs is None else f"queries of {pairs.name}"
    notes = [f"{len(collection.queries)} {kind}, {len(collection.documents)} documents."]
    if pairs is not None and recipe and (trained_on := _trained_on(recipe, shown)):
        notes.append(
            f"{trained_on} of these {len(shown)} pairs were trained on: their results say nothing of new texts."
        )
    return contents(f"What training did: {output.name}", notes, models, collection, rows, {"": output}, load), output


def find_models(output: Path) -> dict[str, str]:
    """The base model and those of the finished stages of a run, by name.

    Raises:
        InputError: if no stage is finished.
    """
    models: dict[str, str] = {}
    for stage, name in _STAGES.items():
        folder = output / stage / "model"
        metadata = read_metadata(folder)
        if metadata is not None:
            models = models or {"before training": str(metadata.history["start"])}
            models[name] = str(folder)
    if not models:
        raise InputError(f"{output}: no trained model is there. Train first, or name another run's output folder.")
    return models


def collection_of(pairs: Sequence[TextPair]) -> Collection:
    """Pairs as a retrieval test in which each query's positives are its answers.

    Raises:
        InputError: if there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise InputError(f"held-out pairs: {len(pairs)}, and a page shows at least 2. Name others: --pairs FILE")
    documents = {text: f"d{number}" for number, text in enumerate(dict.fromkeys(pair.positive for pair in pairs))}
    queries = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(pair.query for pair in pairs))}
    qrels: dict[str, dict[str, int]] = {}
    for pair in pairs:
        qrels.setdefault(queries[pair.query], {})[documents[pair.positive]] = 1
    return Collection(
        "held-out pairs",
        tuple(Document(name, text) for text, name in documents.items()),
        tuple(Document(name, text) for text, name in queries.items()),
        qrels,
    )


def _trained_on(recipe: Recipe, pairs: Sequence[TextPair]) -> int:
    """How many pairs are among those that a recipe trains on."""
    store = open_pairs(recipe)
    trained = (store[index] for index in split(store, recipe.data.held_out, recipe.seed).train.tolist())
    counts = Counter((folded(pair.query), folded(pair.positive)) for pair in pairs)
    return sum(counts[key] for key in {(folded(pair.query), folded(pair.positive)) for pair in trained})


def _held_out(run: Path, recipe: Recipe | None) -> list[TextPair]:
    """The first pairs that a recipe holds out."""
    if recipe is None:
        raise InputError(
            f"{run}: it has no {KEPT} that says which pairs were held out. Name the recipe instead of the folder, "
            "or a file of pairs that were not trained on: --pairs FILE"
        )
    store = open_pairs(recipe)
    return [store[index] for index in split(store, recipe.data.held_out, recipe.seed).held_out[:_MOST].tolist()]
