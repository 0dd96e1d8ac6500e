"""Retrieval tests made of ids alone, and their scores."""

from collections.abc import Iterable, Mapping

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.evaluate.metrics import METRICS, Qrels, measure_queries


def collection(documents: Iterable[str], qrels: dict[str, dict[str, int]]) -> Collection:
    return Collection(
        "made",
        tuple(Document(name, f"text {name}") for name in documents),
        tuple(Document(name, f"text {name}") for name in qrels),
        qrels,
    )


def scored(rankings: Mapping[str, Mapping[str, float]], qrels: Qrels) -> dict[str, dict[str, float]]:
    """`METRICS` of each judged query."""
    measured = measure_queries(rankings, qrels, METRICS.values())
    return {query: {shown: measured[name][query] for shown, name in METRICS.items()} for query in qrels}
