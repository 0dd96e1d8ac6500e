"""The page of a run, from its output folder: the models of its stages, and the base model they started from."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.data.pairs import TextPair, folded, read_pairs
from anchorembed.data.split import split
from anchorembed.errors import InputError
from anchorembed.evaluate.held_out import Instruction, pair_search, with_prompts
from anchorembed.evaluate.metrics import chance
from anchorembed.evaluate.task_types import evaluate_collection
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import read_metadata
from anchorembed.model.vectors import Floats, Side
from anchorembed.page.contents import Page, cached_encoder, contents
from anchorembed.recipe_file import read_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.kept_recipe import KEPT
from anchorembed.train.prepare import load_to_measure, open_pairs
from anchorembed.train.verdict import held_out_pairs

_MOST = 500  # pairs of a file to show
_STAGES = {"reconstruct": "Stage I", "contrast": "Stage II"}


def page_of_run(run: Path, pairs: Path | None = None) -> tuple[Page, Path]:
    """What the page of a run shows, and the run's output folder.

    With a recipe, models and texts are prepared as for the verdict of `train`, so both have the same scores.

    Args:
        run: output folder of a run, which holds its ``recipe.yaml``, or a recipe.
        pairs: file of pairs not trained on, of which 500 are shown; by default those that the recipe holds out.

    Raises:
        InputError: if there is no trained model, or fewer than 2 pairs to show.
    """
    recipe_file = run / KEPT if run.is_dir() else run
    recipe = read_recipe(recipe_file) if recipe_file.exists() or not run.is_dir() else None
    output = recipe.output if recipe and not run.is_dir() else run
    models = find_models(output, recipe.model_before if recipe else "")
    if pairs is not None:
        models_own: Instruction = (None, False)
        shown = [(pair, models_own) for pair in islice(read_pairs(pairs), _MOST)]
    elif recipe is not None:
        shown = held_out_pairs(recipe)
    else:
        raise InputError(
            f"{run}: it has no {KEPT} that says which pairs were held out. Name the recipe instead of the folder, "
            "or a file of pairs that were not trained on: --pairs FILE"
        )
    collection, instructions = collection_of(shown)
    rows = {"chance": chance(collection)}
    trained = read_metadata(Path(list(models.values())[-1]))
    lengths = trained.lengths if trained else None  # the base model's texts are cut alike

    def load(model: str) -> Embedder:
        return load_to_measure(recipe, model) if recipe else Embedder.load(model, lengths=lengths)

    def embed(embedder: Embedder, documents: Sequence[Document], side: Side) -> Floats:
        texts = [(instructions[document], document.text) for document in documents]
        return cached_encoder(embedder, instruction="")(with_prompts(texts, embedder.metadata.prompts, side), side)

    def measure(embedder: Embedder) -> dict[str, float]:
        texts = {"query": collection.queries, "document": tuple(collection.documents)}
        return evaluate_collection(lambda _, side: embed(embedder, texts[side], side), collection)

    for name, model in models.items():
        rows[name] = measure(load(model))
    kind = "held-out queries" if pairs is None else f"queries of {pairs.name}"
    notes = [f"{len(collection.queries)} {kind}, {len(collection.documents)} documents."]
    if pairs is not None and recipe and (trained_on := _trained_on(recipe, [pair for pair, _ in shown])):
        notes.append(
            f"{trained_on} of these {len(shown)} pairs were trained on: their results say nothing of new texts."
        )
    title = f"What training did: {output.name}"
    return contents(title, notes, models, collection, rows, {"": output}, load, embed), output


def find_models(output: Path, before: str = "") -> dict[str, str]:
    """The model ``before`` training, by default the one that the run started from, and those of its finished stages.

    Raises:
        InputError: if no stage is finished.
    """
    models: dict[str, str] = {}
    for stage, name in _STAGES.items():
        folder = output / stage / "model"
        metadata = read_metadata(folder)
        if metadata is not None:
            models = models or {"before training": before or str(metadata.history["start"])}
            models[name] = str(folder)
    if not models:
        raise InputError(f"{output}: no trained model is there. Train first, or name another run's output folder.")
    return models


def collection_of(pairs: Sequence[tuple[TextPair, Instruction]]) -> tuple[Collection, dict[Document, Instruction]]:
    """Pairs as a retrieval test in which each query's positives are its answers, and the instruction of each text.

    Raises:
        InputError: if there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise InputError(f"held-out pairs: {len(pairs)}, and a page shows at least 2. Name others: --pairs FILE")
    test = pair_search(pairs)
    documents = {Document(f"d{row}", text): instruction for row, (instruction, text) in enumerate(test.documents)}
    queries = {Document(f"q{row}", text): instruction for row, (instruction, text) in enumerate(test.queries)}
    qrels = {f"q{row}": {f"d{answer}": 1 for answer in answers} for row, answers in enumerate(test.relevant)}
    return Collection("held-out pairs", tuple(documents), tuple(queries), qrels), documents | queries


def _trained_on(recipe: Recipe, pairs: Sequence[TextPair]) -> int:
    """How many pairs are among those that a recipe trains on."""
    store = open_pairs(recipe)
    trained = (store[index] for index in split(store, recipe.data.held_out, recipe.seed).train.tolist())
    counts = Counter((folded(pair.query), folded(pair.positive)) for pair in pairs)
    return sum(counts[key] for key in {(folded(pair.query), folded(pair.positive)) for pair in trained})
