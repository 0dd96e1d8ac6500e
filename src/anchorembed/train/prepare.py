"""From a recipe to the data and model of a stage: pairs on disk, their split, order and tokens, and the embedder."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from anchorembed.data.pairs import TextPair
from anchorembed.data.sampling import batches, share_used, steps_an_epoch
from anchorembed.data.split import Split, split
from anchorembed.data.store import PairStore, SourceFile, open_store
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Template
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.system.files import cache_folder

_log = logging.getLogger(__name__)
AnySchedule = TypeVar("AnySchedule", bound=Schedule)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and model of a run: pairs on disk, their split, and the embedder to train."""

    store: PairStore
    split: Split
    embedder: Embedder
    temperature: float

    def order(self, size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Indices of each step's pairs, from step ``start`` on."""
        return batches(self.store, self.split.train, size, seed, start, self.temperature)

    def in_steps(self, settings: AnySchedule, seed: int) -> AnySchedule:
        """A stage's settings with its epochs, if it has them, as steps; above temperature 1, as so many pairs."""
        if settings.epochs is None:
            return settings
        size, train = settings.batch_size, self.split.train
        steps = len(train) / size if self.temperature > 1 else steps_an_epoch(self.store, train, size, seed)
        return settings.model_copy(update={"steps": math.ceil(settings.epochs * steps)})

    def share_used(self, size: int, seed: int) -> float:
        """Share of the training pairs that an epoch uses in steps of ``size``."""
        return share_used(self.store, self.split.train, size, seed) if self.temperature == 1 else 1.0

    def tokens(self, indices: Sequence[int], most_negatives: int | None = None) -> list[TokenPair]:
        """Read and tokenise the pairs of a step, each with at most ``most_negatives`` hard negatives."""
        pairs: list[TextPair] = [self.store[index] for index in indices]
        sources = [self.store.sources[self.store.source_of(index)] for index in indices]
        defaults = self.embedder.metadata.prompts
        prompts = [defaults.of_pairs(source.instruction, source.symmetric) for source in sources]
        query_prompts, document_prompts = [each.query for each in prompts], [each.document for each in prompts]
        return self.embedder.pairs.tokenize(pairs, query_prompts, document_prompts, most_negatives)

    def summary(self) -> dict[str, object]:
        """Numbers of pairs (all, by source, to train on, held out), and of dropped lines by reason."""
        sizes = zip(self.store.sources, self.store.bounds[1:] - self.store.bounds[:-1], strict=True)
        dropped = {
            source.name: counts for source, counts in zip(self.store.sources, self.store.dropped, strict=True) if counts
        }
        return {
            "pairs": len(self.store),
            "train": len(self.split.train),
            "held_out": len(self.split.held_out),
            "near_held_out": len(self.store) - len(self.split.train) - len(self.split.held_out),
            "sources": {source.name: int(size) for source, size in sizes},
            "dropped": dropped,
        }

    def lines_of(self, indices: Sequence[int]) -> str:
        """Source and line of the first ten pairs."""
        named = [f"{self.store[index].source}:{self.store[index].line}" for index in indices[:10]]
        return ", ".join(named) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def prepare(recipe: Recipe, start: str) -> Prepared:
    """Open the recipe's data and load the model ``start``."""
    data = recipe.data
    store = open_pairs(recipe)
    parts = split(store, data.held_out, recipe.seed)
    shared = len(store) - len(parts.train) - len(parts.held_out)
    left_out = f"; {shared} are left out, as they share a text with held-out pairs" if shared else ""
    held_out = f"{len(parts.held_out)} held out"
    if len(parts.held_out) < data.held_out:
        held_out += f" (at most a tenth; data.held_out is {data.held_out})"
    _log.info("data: %s pairs to train on, %s, of %s%s", len(parts.train), held_out, len(store), left_out)
    if len({instruction or "" for instruction in data.instructions}) > 1:
        _log.info("data: instructions differ by source, so the model keeps none of them; data.instruction says which")
    embedder = load_embedder(recipe, start, recipe.model.device)
    for source in store.sources:
        prompts = embedder.metadata.prompts.of_pairs(source.instruction, source.symmetric)
        embedder.pairs.check_room(prompts.query, data.query_tokens)
        embedder.pairs.check_room(prompts.document, data.document_tokens)
    return Prepared(store, parts, embedder, data.temperature)


def load_embedder(recipe: Recipe, start: str, device: str) -> Embedder:
    """Load the model ``start`` with the recipe's precision, weights, template, lengths and instruction."""
    instructions = recipe.data.instructions
    embedder = Embedder.load(
        start,
        precision=recipe.model.precision,
        weights=recipe.model.weights,
        device=device,
        template=own_template(recipe),
        lengths=Lengths(recipe.data.query_tokens, recipe.data.document_tokens),
        instruction=instructions[0] if len(instructions) == 1 else None,
    )
    if recipe.model.residual == "bfloat16" and embedder.dtype == torch.bfloat16:
        embedder.backbone.residual_dtype = torch.bfloat16
    return embedder


def load_to_measure(recipe: Recipe, model: str) -> Embedder:
    """Load a model as for training, but with nf4 as bfloat16, the dtype in which trained models are saved."""
    if recipe.model.weights == "nf4":
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "bfloat16"})})
    return load_embedder(recipe, model, recipe.model.device)


def open_pairs(recipe: Recipe) -> PairStore:
    """Open the recipe's sources, converting those that are not in the cache yet."""
    data = recipe.data
    sources = [
        SourceFile(source.name, source.path, data.instruction_of(source), source.symmetric) for source in data.sources
    ]
    return open_store(sources, cache_folder() / "pairs", skip_bad=data.skip_bad)


def own_template(recipe: Recipe) -> Template | None:
    """The recipe's template, or None for the model's own."""
    return Template(**recipe.model.template.model_dump()) if recipe.model.template else None
