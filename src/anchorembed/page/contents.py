"""What a page shows: scores, curves, hits before and after training, maps of vectors, and what a vector says.

Axes: N texts, D documents, Q queries, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.evaluate.metrics import METRICS, relevant
from anchorembed.evaluate.task_types import Embed
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats, Side, cosines
from anchorembed.page.learning_curves import Chart, learning_curves
from anchorembed.page.vector_map import VectorMap, vector_map
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.files import cache_folder
from anchorembed.train.read_vector import Reading, read

_SEARCHES, _HITS, _ON_MAP = 3, 3, 40  # queries with hits, hits of each, pairs on a map
_SHOWN = 400  # characters of a text


@dataclass(frozen=True, slots=True)
class PageHit:
    """A document, its cosine with the query, and whether it answers the query."""

    id: str
    text: str
    score: float
    is_relevant: bool


@dataclass(frozen=True, slots=True)
class PageSearch:
    """A query, with each model's hits by the model's name, and the rank of the first document that answers it."""

    query: str
    hits: dict[str, list[PageHit]]
    ranks: dict[str, int]


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows; models are named as in its table."""

    title: str
    notes: list[str]
    rows: Mapping[str, Mapping[str, float]]
    charts: list[Chart]
    searches: list[PageSearch]
    maps: dict[str, VectorMap]
    text: str
    other: str
    readings: dict[str, Reading]

    @property
    def metrics(self) -> list[str]:
        """Columns of the table."""
        return [name for name in METRICS if all(name in row for row in self.rows.values())]


def cached_encoder(
    embedder: Embedder, progress: Callable[[int], None] | None = None, instruction: str | None = None
) -> Embed:
    """A function of texts to unit vectors [N, H], kept in the cache, because scores and page need the same ones."""
    cache = VectorCache(embedder, cache_folder() / "vectors")
    return lambda texts, side: cache.vectors(texts, side, instruction, progress)


def embed_by_model(embedder: Embedder, documents: Sequence[Document], side: Side) -> Floats:
    """Unit vectors [N, H] of queries or documents, with the model's own prompts."""
    return cached_encoder(embedder)([document.text for document in documents], side)


def contents(
    title: str,
    notes: list[str],
    models: Mapping[str, str],
    collection: Collection,
    rows: Mapping[str, Mapping[str, float]],
    logs: Mapping[str, Path],
    load: Callable[[str], Embedder] = Embedder.load,
    embed: Callable[[Embedder, Sequence[Document], Side], Floats] = embed_by_model,
) -> Page:
    """What the page shows of ``models``, by name: the one before training comes first, the last trained one last.

    ``collection`` has held-out queries and documents, ``rows`` the scores by metric of each row. ``logs`` are output
    folders of runs, by the name of what they trained; their stages' logs give the curves. ``load`` loads a model.
    ``embed`` gives the vectors of queries or documents of the collection.
    """
    shown = spread(collection, _ON_MAP)
    texts_on_map = [(query.text[:_SHOWN], document.text[:_SHOWN]) for query, document in shown]
    searched = spread(collection, _SEARCHES)
    (_, text), (_, other) = (searched * 2)[:2]
    searches = [PageSearch(query.text, {}, {}) for query, _ in searched]
    maps: dict[str, VectorMap] = {}
    readings: dict[str, Reading] = {}
    for name, model in models.items():
        embedder = load(model)
        queries_NH = embed(embedder, [query for query, _ in shown], "query")
        documents_NH = embed(embedder, [document for _, document in shown], "document")
        maps[name] = vector_map(texts_on_map, queries_NH, documents_NH)
        if name in (next(iter(models)), list(models)[-1]):
            documents_DH = embed(embedder, list(collection.documents), "document")
            searching_NH = embed(embedder, [query for query, _ in searched], "query")
            for search, (query, _), query_H in zip(searches, searched, searching_NH, strict=True):
                ranked = _ranked(collection, query.id, cosines(query_H, documents_DH))
                search.hits[name] = ranked[:_HITS]
                search.ranks[name] = next(rank for rank, hit in enumerate(ranked, 1) if hit.is_relevant)
        readings[name] = read(embedder, text.text, other=other.text)
    texts = (text.text[:_SHOWN], other.text[:_SHOWN])
    return Page(title, notes, rows, list(learning_curves(logs)), searches, maps, *texts, readings)


def spread(collection: Collection, most: int) -> list[tuple[Document, Document]]:
    """At most ``most`` queries, spread over a collection, each with a document that answers it."""
    documents = {document.id: document for document in collection.documents}
    pairs = []
    for query in collection.queries:
        answers = sorted(relevant(collection.qrels.get(query.id, {})) & documents.keys())
        pairs += [(query, documents[answers[0]])] if answers else []
    count = min(most, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def _ranked(collection: Collection, query: str, scores_D: Floats) -> list[PageHit]:
    """All documents, the nearest first; equal scores by id."""
    answers = relevant(collection.qrels.get(query, {}))
    hits = [
        PageHit(document.id, " ".join(document.text.split())[:_SHOWN], float(score), document.id in answers)
        for document, score in zip(collection.documents, scores_D, strict=True)
    ]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))
