"""On real collections, too, mteb, ir-measures and sentence-transformers agree.

Runs where there are some: `ANCHOREMBED_DATA=DIR pytest tests/test_agreement.py`, with the folder of docs/data.md. The
embedder is the tiny random one: it is the scorers that are compared.
"""

import os
from pathlib import Path

import pytest
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores  # what mteb scores by, unrounded
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from anchorembed.benchmarking import Adapter, TaskScore, run_tasks
from anchorembed.embedder import Embedder
from anchorembed.evaluation import evaluate_collection, rank
from anchorembed.exporting import export
from anchorembed.records import read_collection
from anchorembed.tasks import find_tasks
from anchorembed.testsets import Candidates, SentencePair, read_test_set
from anchorembed.vectors import VectorCache

Models = tuple[Embedder, SentenceTransformer]

CLOSE = 1e-6
TESTS = Path(os.environ.get("ANCHOREMBED_DATA", "nowhere")) / "test"
BEIR = sorted(path.parent for path in TESTS.glob("*/corpus.jsonl.gz"))

pytestmark = pytest.mark.skipif(not TESTS.is_dir(), reason="$ANCHOREMBED_DATA is not set")


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    place = tmp_path_factory.mktemp("models")
    Embedder.load(tiny_folder, precision="float32").save(place / "native")
    export(place / "native", place / "exported")
    native = Embedder.load(place / "native", precision="float32")
    return native, SentenceTransformer(str(place / "exported"), device="cpu")


def score(embedder: Embedder, path: Path, tmp_path: Path) -> TaskScore:
    adapter = Adapter(embedder, "tiny", VectorCache(embedder, tmp_path / "vectors"), {})
    (found,) = run_tasks(adapter, find_tasks([str(path)]))
    return found


@pytest.mark.parametrize("folder", BEIR, ids=lambda path: path.name)
def test_retrieval(models: Models, folder: Path, tmp_path: Path) -> None:
    embedder, judge = models
    collection = read_collection(folder)
    through_mteb = score(embedder, folder, tmp_path)
    ours = evaluate_collection(embedder, collection)
    queries, documents = (
        embedder.encode([one.text for one in part], side)
        for part, side in ((collection.queries, "query"), (collection.documents, "document"))
    )
    run = rank(queries, documents, [one.id for one in collection.queries], [one.id for one in collection.documents])
    unrounded = calculate_retrieval_scores(run, collection.qrels, [10]).all_scores
    assert set(through_mteb.items) == set(ours.per_query)
    for query, value in through_mteb.items.items():
        assert ours.per_query[query]["nDCG@10"] == pytest.approx(value, abs=CLOSE)
        assert unrounded[query]["ndcg_cut_10"] == pytest.approx(value, abs=CLOSE)
    if {grade for grades in collection.qrels.values() for grade in grades.values()} <= {0, 1}:
        information = InformationRetrievalEvaluator(
            {query.id: query.text for query in collection.queries},
            {document.id: document.text for document in collection.documents},
            {query: {d for d, grade in grades.items() if grade > 0} for query, grades in collection.qrels.items()},
            write_csv=False,
        )
        assert information(judge)["cosine_ndcg@10"] == pytest.approx(through_mteb.value, abs=CLOSE)


@pytest.mark.parametrize("file", sorted((TESTS / "rerank").glob("*_test.*")), ids=lambda path: path.name)
def test_reranking(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [
        {"query": row.query, "positive": list(row.positives), "negative": list(row.negatives)}
        for row in read_test_set(file).rows
        if isinstance(row, Candidates)
    ]
    value = score(embedder, file, tmp_path).value
    assert RerankingEvaluator(rows, write_csv=False)(judge)["map"] == pytest.approx(value, abs=CLOSE)


@pytest.mark.parametrize("file", sorted((TESTS / "sts").glob("*_test.*")), ids=lambda path: path.name)
def test_similarity(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [row for row in read_test_set(file).rows if isinstance(row, SentencePair)]
    similar = EmbeddingSimilarityEvaluator(
        [row.first for row in rows], [row.second for row in rows], [row.value for row in rows], write_csv=False
    )
    value = score(embedder, file, tmp_path).value
    assert similar(judge)["spearman_cosine"] == pytest.approx(value, abs=CLOSE)
