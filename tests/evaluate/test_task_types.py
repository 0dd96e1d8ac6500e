"""Our scores are those of mteb, ir-measures and sentence-transformers, and items average to them.

On real collections, too: `ANCHOREMBED_DATA=DIR pytest tests/evaluate/test_task_types.py`, with the folder of
docs/data.md. The embedder is a tiny random model, because the scorers are compared, not models.
"""

import json
import os
from math import log2
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from anchorembed.data.beir import read_collection
from anchorembed.data.evaluation_files import Candidates, SentencePair, read_test_set
from anchorembed.evaluate import task_types
from anchorembed.evaluate.task_types import Embed, draw_training_texts, evaluate_collection, retrieval
from anchorembed.evaluate.tasks import TaskScore
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Side
from collections_made import collection
from judge import judged, mteb_task
from judged_files import FILES, scores, task_embedder

CLOSE = 1e-6
REAL = Path(os.environ.get("ANCHOREMBED_DATA", "nowhere")) / "test"
Models = tuple[Embedder, SentenceTransformer]

on_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="$ANCHOREMBED_DATA is not set")


def lookup(queries: dict[str, list[float]], documents: dict[str, list[float]]) -> Embed:
    """Looks each text's vector up, apart for queries and documents."""
    vectors: dict[Side, dict[str, list[float]]] = {"query": queries, "document": documents}
    return lambda texts, side: np.array([vectors[side][text] for text in texts], np.float32)


def test_evaluating_a_collection_embeds_each_side_as_itself() -> None:
    made = collection(["a", "b", "q"], {"q": {"q": 1}, "p": {"a": 1}})
    documents = {"text a": [1.0, 0.0], "text b": [0.6, 0.8], "text q": [0.0, 9.0]}
    embed = lookup({"text q": [0.0, 1.0], "text p": [0.0, 5.0]}, documents)
    # A document with the query's own id stays: q finds itself first. p finds a last, behind q and b.
    assert retrieval(made, embed).items == pytest.approx({"q": 1, "p": 1 / log2(4)})
    means = {"nDCG@10": (1 + 1 / log2(4)) / 2, "MRR@10": (1 + 1 / 3) / 2, "Recall@100": 1}
    assert evaluate_collection(embed, made) == pytest.approx(means)


def test_every_kind_and_its_items(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    found = scores(embedder, tmp_path, *(data / name for name in ("beir", "rerank", "sts", "pairs.jsonl", "classes")))
    assert [score.kind for score in found] == ["Retrieval", "Reranking", "STS", "PairClassification", "Classification"]
    assert [score.metric for score in found] == ["nDCG@10", "MAP", "Spearman", "AP", "accuracy"]
    assert [len(score.items) for score in found] == [12, 9, 30, 0, 24]
    for score in found:
        assert score.scores["test"][0]["main_score"] == score.value
        if score.items:
            assert np.mean([*score.items.values()]) == pytest.approx(score.value, abs=1e-12), score.task
    assert len({round(score.value, 6) for score in found}) == len(found)


def differences(embedder: Embedder, data: Path, folder: Path, kind: str) -> tuple[float, float, float]:
    """How far our main score, the items of it and the other scores are from mteb's."""
    place = data / FILES[kind]
    (ours,) = scores(embedder, folder, place)
    theirs, unrounded = judged(place, task_embedder(embedder, folder))
    main = np.mean([*unrounded.values()]) if unrounded else theirs.scores["test"][0]["main_score"]
    assert not unrounded or set(unrounded) == set(ours.items)
    of_items = max((abs(value - ours.items[item]) for item, value in unrounded.items()), default=0.0)
    whole = {name: value for name, value in ours.scores["test"][0].items() if isinstance(value, float)}
    assert len(whole) > 2
    others = max(abs(value - theirs.scores["test"][0][name]) for name, value in whole.items())
    return abs(ours.value - main), of_items, others


@pytest.mark.parametrize("kind", FILES)
def test_our_scores_are_mteb_s(kind: str, embedder: Embedder, data: Path, tmp_path: Path) -> None:
    main, of_items, others = differences(embedder, data, tmp_path, kind)
    assert max(main, of_items) <= CLOSE
    assert others <= 5.1e-6  # mteb rounds those of a ranking to five digits


@pytest.mark.parametrize(
    ("kind", "name", "fault"),
    [
        ("Retrieval", "rank", lambda *_: {f"d{n}": {"d0": 1.0} for n in range(12)}),
        ("Reranking", "rank_candidates", lambda *given: {q: dict.fromkeys(given[-1][q], 1.0) for q in given[2]}),
        ("STS", "rankdata", lambda rows, axis: rows),
        ("PairClassification", "paired_cosines", lambda first, _: first[:, 0] > np.median(first[:, 0])),
        ("Classification", "_SEED", 43),
        ("Classification", "_TEXTS_PER_LABEL", 7),
    ],
)
def test_other_scores_are_seen(
    kind: str,
    name: str,
    fault: object,
    embedder: Embedder,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a scorer gets wrong is far outside what two that agree differ by."""
    place = data / FILES[kind]
    theirs, _ = judged(place, task_embedder(embedder, tmp_path))
    monkeypatch.setattr(task_types, name, fault)
    (ours,) = scores(embedder, tmp_path, place)
    assert abs(ours.value - theirs.value) > 1e-3


def test_classifiers_learn_from_the_texts_that_mteb_draws(data: Path) -> None:
    """Also where a label has fewer texts than are drawn."""
    labels = [*"aabbb", *"cccccccccccccccccccc", *"dddddddddddddddddddd"]
    task, before = mteb_task(data / FILES["Classification"]), None
    train = Dataset.from_dict({"label": labels})
    for ours in draw_training_texts(labels):
        _, before, theirs = task._undersample_data(train, 0, before)
        assert ours == theirs
        assert len(ours) == 2 + 3 + 8 + 8


def test_the_demo_s_scores_are_those_of_a_task(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    (score,) = scores(embedder, tmp_path, data / "beir")
    collection = read_collection(data / "beir")
    ours = evaluate_collection(embedder.encode, collection)
    assert ours["Recall@100"] == pytest.approx(score.scores["test"][0]["recall_at_100"], abs=CLOSE)
    assert ours["nDCG@10"] == pytest.approx(score.value, abs=CLOSE)


def test_sentence_transformers_agrees(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    """Binary judgements, similarity and reranking, by its own evaluators on the exported model."""
    qrels = data / "beir" / "qrels" / "test.tsv"
    kept = [line for line in qrels.read_text(encoding="utf-8").splitlines() if not line.endswith("\t2")]
    qrels.write_text("\n".join(kept) + "\n", encoding="utf-8")
    embedder.save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported")
    judge = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    native = Embedder.load(tmp_path / "model", precision="float32")
    retrieval, rerank, sts = scores(native, tmp_path, data / "beir", data / "rerank", data / "sts")

    beir = read_collection(data / "beir")
    information = InformationRetrievalEvaluator(
        {query.id: query.text for query in beir.queries},
        {document.id: document.text for document in beir.documents},
        {query: {d for d, grade in grades.items() if grade > 0} for query, grades in beir.qrels.items()},
        write_csv=False,
    )
    assert information(judge)["cosine_ndcg@10"] == pytest.approx(retrieval.value, abs=1e-5)
    rows = [json.loads(line) for line in (data / "rerank" / "r_test.jsonl").read_text(encoding="utf-8").splitlines()]
    ranking = RerankingEvaluator(rows, write_csv=False)
    assert ranking(judge)["map"] == pytest.approx(rerank.value, abs=1e-5)
    rows = [json.loads(line) for line in (data / "sts" / "s_test.jsonl").read_text(encoding="utf-8").splitlines()]
    first, second, gold = ([row[key] for row in rows] for key in ("sentence1", "sentence2", "score"))
    similar = EmbeddingSimilarityEvaluator(first, second, gold, write_csv=False)
    assert similar(judge)["spearman_cosine"] == pytest.approx(sts.value, abs=1e-5)


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    Embedder.load(tiny_folder, precision="float32").save(folder / "native")
    export(folder / "native", folder / "exported")
    native = Embedder.load(folder / "native", precision="float32")
    return native, SentenceTransformer(str(folder / "exported"), device="cpu")


def each_file(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", sorted((REAL / kind).glob("*_test.*")), ids=lambda path: path.name)


def score_beside_mteb(embedder: Embedder, path: Path, tmp_path: Path) -> TaskScore:
    """Our score, which is mteb's, too, and that of each query."""
    (ours,) = scores(embedder, tmp_path, path)
    theirs, unrounded = judged(path, task_embedder(embedder, tmp_path))
    if unrounded:
        assert ours.items == pytest.approx(unrounded, abs=CLOSE)
    assert ours.value == pytest.approx(theirs.value, abs=CLOSE)
    return ours


@on_real_data
@pytest.mark.parametrize("corpus", sorted(REAL.glob("*/corpus.jsonl.gz")), ids=lambda path: path.parent.name)
def test_real_retrieval(models: Models, corpus: Path, tmp_path: Path) -> None:
    embedder, judge = models
    collection = read_collection(corpus.parent)
    score = score_beside_mteb(embedder, corpus.parent, tmp_path)
    assert score.items == pytest.approx(retrieval(collection, embedder.encode).items, abs=CLOSE)
    if {grade for grades in collection.qrels.values() for grade in grades.values()} <= {0, 1}:
        information = InformationRetrievalEvaluator(
            {query.id: query.text for query in collection.queries},
            {document.id: document.text for document in collection.documents},
            {query: {d for d, grade in grades.items() if grade > 0} for query, grades in collection.qrels.items()},
            write_csv=False,
        )
        assert information(judge)["cosine_ndcg@10"] == pytest.approx(score.value, abs=CLOSE)


@on_real_data
@each_file("rerank")
def test_real_reranking(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [
        {"query": row.query, "positive": list(row.positives), "negative": list(row.negatives)}
        for row in read_test_set(file).rows
        if isinstance(row, Candidates)
    ]
    value = score_beside_mteb(embedder, file, tmp_path).value
    assert RerankingEvaluator(rows, write_csv=False)(judge)["map"] == pytest.approx(value, abs=CLOSE)


@on_real_data
@each_file("sts")
def test_real_similarity(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [row for row in read_test_set(file).rows if isinstance(row, SentencePair)]
    similar = EmbeddingSimilarityEvaluator(
        [row.first for row in rows], [row.second for row in rows], [row.value for row in rows], write_csv=False
    )
    value = score_beside_mteb(embedder, file, tmp_path).value
    assert similar(judge)["spearman_cosine"] == pytest.approx(value, abs=CLOSE)


@on_real_data
@each_file("classification")
def test_real_classification(models: Models, file: Path, tmp_path: Path) -> None:
    score_beside_mteb(models[0], file, tmp_path)
