"""A quick part is fixed, keeps whole queries, and says that it is a part."""

from pathlib import Path

import numpy as np
import pytest

from anchorembed.data.beir import Collection
from anchorembed.errors import InputError
from anchorembed.evaluate import local, quick
from anchorembed.evaluate.quick import subset
from anchorembed.model.embedder import Embedder
from collections_made import collection
from judged_files import scores


def big() -> Collection:
    rng = np.random.default_rng(5)
    names = [f"d{number}" for number in range(400)]
    qrels = {}
    for query in range(60):
        judged = rng.permutation(names)[: rng.integers(2, 9)].tolist()
        qrels[f"q{query}"] = {str(name): int(place > 0) for place, name in enumerate(judged)}
    return collection(names, qrels)


def test_subset_keeps_whole_queries() -> None:
    full = big()
    small = subset(full, 80)
    ids = {document.id for document in small.documents}
    assert len(small.documents) == 80
    assert [document for document in full.documents if document.id in ids] == list(small.documents)
    assert {query.id for query in small.queries} == set(small.qrels)
    assert len(small.queries) >= 10
    for query in full.queries:
        relevant = {name for name, grade in full.qrels[query.id].items() if grade > 0}
        assert (query in small.queries) == (relevant <= ids)
        if query in small.queries:
            assert small.qrels[query.id] == {k: v for k, v in full.qrels[query.id].items() if k in ids}


def test_subset_depends_on_ids_alone() -> None:
    full = big()
    turned = Collection(full.name, full.documents[::-1], full.queries[::-1], dict(reversed(list(full.qrels.items()))))
    small = subset(full, 80)
    assert set(subset(turned, 80).documents) == set(small.documents)
    assert subset(turned, 80).qrels == small.qrels


def test_subset_is_the_same_on_every_machine() -> None:
    made = collection([f"d{number}" for number in range(30)], {"p": {"d1": 1, "d2": 2}, "q": {"d3": 1}})
    assert [document.id for document in subset(made, 6).documents] == ["d1", "d2", "d3", "d7", "d21", "d28"]


def test_subset_of_everything_and_of_too_little() -> None:
    full = big()
    assert subset(full, 9999).documents == full.documents
    assert subset(full, 9999).qrels == full.qrels
    with pytest.raises(InputError, match="no query has all its relevant documents in 1"):
        subset(collection("abc", {"q": {"a": 1, "b": 1}}), 1)


def test_quick_is_a_fixed_part_and_says_so(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "QUICK_ITEMS", 10)
    monkeypatch.setattr(local, "QUICK_DOCUMENTS", 20)
    names = [data / "beir", data / "rerank", data / "sts", data / "classes"]
    first, second = (scores(embedder, tmp_path, *names, quick=True) for _ in range(2))
    assert [score.task for score in first] == ["beir-quick", "r_test-quick", "s_test-quick", "c_test-quick"]
    assert [score.items for score in first] == [score.items for score in second]
    assert [len(score.items) for score in first][1:] == [9, 10, 10]
    assert 0 < len(first[0].items) < 12
