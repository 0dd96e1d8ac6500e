"""Retrieval tests made of ids alone."""

from collections.abc import Iterable

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document


def collection(documents: Iterable[str], qrels: dict[str, dict[str, int]]) -> Collection:
    return Collection(
        "made",
        tuple(Document(name, f"text {name}") for name in documents),
        tuple(Document(name, f"text {name}") for name in qrels),
        qrels,
    )
