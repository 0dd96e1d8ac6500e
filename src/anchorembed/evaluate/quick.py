"""A fixed part of a task, the same on every machine: what ``--quick`` evaluates."""

import random

from anchorembed.data.beir import Collection
from anchorembed.errors import InputError
from anchorembed.evaluate.metrics import relevant
from anchorembed.system.files import hash_texts

QUICK_DOCUMENTS, QUICK_ITEMS = 1000, 500


def quick_items(count: int) -> list[int]:
    """Indices, ascending, of a fixed choice of `QUICK_ITEMS` of ``count`` items, or of all if there are fewer."""
    return sorted(random.Random(0).sample(range(count), min(count, QUICK_ITEMS)))  # noqa: S311 - a fixed choice


def subset(collection: Collection, documents: int) -> Collection:
    """Return a collection of at most ``documents`` documents that depends only on ids and judgements.

    Queries are taken in the order of a hash of their ids, each with all its relevant documents if these still fit.
    Other documents, in the order of such a hash, fill the rest. Queries with all their relevant documents are kept.

    Raises:
        InputError: if there are no such queries.
    """
    ids = {document.id for document in collection.documents}
    grades = {query.id: collection.qrels.get(query.id, {}) for query in collection.queries}
    wanted = {query: relevant(judged) for query, judged in grades.items() if relevant(judged) <= ids}
    pool: set[str] = set()
    for query in sorted(wanted, key=_shuffled):
        if len(pool | wanted[query]) <= documents:
            pool |= wanted[query]
    others = sorted(ids - pool, key=_shuffled)
    pool.update(others[: documents - len(pool)])
    kept = {query for query, needed in wanted.items() if needed and needed <= pool}
    if not kept:
        raise InputError(
            f"{collection.name}: no query has all its relevant documents in {documents}. Ask for more documents."
        )
    return Collection(
        f"{collection.name}-{len(pool)}",
        tuple(document for document in collection.documents if document.id in pool),
        tuple(query for query in collection.queries if query.id in kept),
        {
            query: {document: grade for document, grade in judged.items() if document in pool}
            for query, judged in grades.items()
            if query in kept
        },
    )


def _shuffled(name: str) -> str:
    """A sort key that puts names in a fixed random order."""
    return hash_texts(["0:", name])
