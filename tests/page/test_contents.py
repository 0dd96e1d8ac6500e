"""What the page shows is what the models give."""

import json
from dataclasses import replace

import pytest

from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document
from anchorembed.page.contents import Page, spread

PAIRS = [
    (Document(f"q{number}", f"query {number}"), Document(f"d{number}", f"document {number}")) for number in range(4)
]


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
    many = [Document(str(number), "text") for number in range(6)]
    judged = Collection("c", tuple(many), tuple(many), {text.id: {text.id: 1} for text in many})
    assert [query.id for query, _ in spread(judged, 4)] == ["0", "1", "3", "4"]


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
