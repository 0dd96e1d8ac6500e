"""What the page shows is what the models give: hits, maps, curves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.page.contents import Page, charts, spread, vector_map

PAIRS = [
    (Document(f"q{number}", f"query {number}"), Document(f"d{number}", f"document {number}")) for number in range(4)
]


def test_the_map_keeps_what_a_plane_holds() -> None:
    """Points of a plane in five dimensions keep their distances, up to the signs, which are fixed."""
    rng = np.random.default_rng(0)
    plane_2H = np.linalg.qr(rng.normal(size=(5, 2)))[0].T
    points_N2 = rng.normal(size=(8, 2))
    vectors_NH = (points_N2 @ plane_2H + 3).astype(np.float32)
    made = vector_map(PAIRS, vectors_NH[:4], vectors_NH[4:])
    drawn_N2 = np.array(made.queries + made.documents)
    for first in range(8):
        distances = np.linalg.norm(drawn_N2 - drawn_N2[first], axis=1)
        assert distances == pytest.approx(np.linalg.norm(points_N2 - points_N2[first], axis=1), abs=1e-5)
    assert made.share == pytest.approx(1)
    assert made.texts[2] == ("query 2", "document 2")
    assert made == vector_map(PAIRS, vectors_NH[:4], vectors_NH[4:])
    assert vector_map(PAIRS, np.eye(8)[:4], np.eye(8)[4:]).share == pytest.approx(2 / 7)
    assert vector_map(PAIRS, np.ones((4, 8)), np.ones((4, 8))).share == 0


def test_queries_are_spread_and_have_an_answer() -> None:
    documents, queries = tuple(document for _, document in PAIRS), tuple(query for query, _ in PAIRS)
    qrels = {"q0": {"d0": 1}, "q1": {"d1": 0}, "q2": {"d3": 1, "d2": 1}, "q3": {"d3": 1}}
    collection = Collection("c", documents, queries, qrels)
    assert [(query.id, document.id) for query, document in spread(collection, 9)] == [
        ("q0", "d0"),
        ("q2", "d2"),
        ("q3", "d3"),
    ]
    assert [query.id for query, _ in spread(collection, 1)] == ["q0"]


def test_curves_are_those_of_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "contrast" / "log.jsonl"
    log.parent.mkdir()
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "held_out_accuracy": 0.5}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    loss, accuracy = charts({"one": tmp_path, "none": tmp_path / "none"})
    assert loss.curves == {"one": [(1, 2.0), (2, 1.0)]}
    assert (accuracy.title, accuracy.curves) == ("Stage II: accuracy on held-out pairs", {"one": [(2, 0.5)]})


@pytest.mark.slow
def test_every_model_has_its_part(page: Page) -> None:
    models = ["before training", "Stage I", "Stage II"]
    assert list(page.rows) == ["chance", *models]
    assert list(page.maps) == list(page.readings) == models
    assert page.metrics == ["nDCG@10", "MRR@10", "Recall@100"]
    assert len({json.dumps(row) for row in page.rows.values()}) > 2
    assert [chart.title.split(":")[0] for chart in page.charts] == ["Stage II", "Stage II", "Stage I", "Stage I"]
    assert len(page.searches) == 3
    for search in page.searches:
        assert list(search.hits) == list(search.ranks) == [models[0], models[-1]]
        assert [search.ranks[name] <= 3 for name in search.hits] == [
            any(hit.is_relevant for hit in hits) for hits in search.hits.values()
        ]
        for hits in search.hits.values():
            assert len(hits) == 3
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert replace(page, rows={"a": {"nDCG@10": 1.0}}).metrics == ["nDCG@10"]
