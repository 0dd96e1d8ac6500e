"""On real collections, too, our scores are those of mteb, ir-measures and sentence-transformers.

To run it: `ANCHOREMBED_DATA=DIR pytest tests/evaluate/test_agreement.py`, with the folder of docs/data.md. The embedder
is a tiny random model, because the scorers are compared, not models.
"""

import os
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from anchorembed.data.beir import read_collection
from anchorembed.data.judged import Candidates, SentencePair, read_test_set
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.ranking import evaluate_collection
from anchorembed.evaluate.tasks import Adapter, TaskScore, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.model.export import export
from anchorembed.search.vector_cache import VectorCache
from judge import judged

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


def each_file(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", sorted((TESTS / kind).glob("*_test.*")), ids=lambda path: path.name)


def score(embedder: Embedder, path: Path, tmp_path: Path) -> TaskScore:
    """Our score, which is mteb's, too, and that of each query."""
    adapter = Adapter(embedder, "tiny", VectorCache(embedder, tmp_path / "vectors"), {})
    (found,) = run_tasks(adapter, find_tasks([str(path)]))
    theirs, unrounded = judged(path, adapter)
    if unrounded:
        assert found.items == pytest.approx(unrounded, abs=CLOSE)
    assert found.value == pytest.approx(theirs.value, abs=CLOSE)
    return found


@pytest.mark.parametrize("folder", BEIR, ids=lambda path: path.name)
def test_retrieval(models: Models, folder: Path, tmp_path: Path) -> None:
    embedder, judge = models
    collection = read_collection(folder)
    found = score(embedder, folder, tmp_path)
    ours = evaluate_collection(embedder, collection)
    assert found.items == pytest.approx({query: one["nDCG@10"] for query, one in ours.per_query.items()}, abs=CLOSE)
    if {grade for grades in collection.qrels.values() for grade in grades.values()} <= {0, 1}:
        information = InformationRetrievalEvaluator(
            {query.id: query.text for query in collection.queries},
            {document.id: document.text for document in collection.documents},
            {query: {d for d, grade in grades.items() if grade > 0} for query, grades in collection.qrels.items()},
            write_csv=False,
        )
        assert information(judge)["cosine_ndcg@10"] == pytest.approx(found.value, abs=CLOSE)


@each_file("rerank")
def test_reranking(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [
        {"query": row.query, "positive": list(row.positives), "negative": list(row.negatives)}
        for row in read_test_set(file).rows
        if isinstance(row, Candidates)
    ]
    value = score(embedder, file, tmp_path).value
    assert RerankingEvaluator(rows, write_csv=False)(judge)["map"] == pytest.approx(value, abs=CLOSE)


@each_file("sts")
def test_similarity(models: Models, file: Path, tmp_path: Path) -> None:
    embedder, judge = models
    rows = [row for row in read_test_set(file).rows if isinstance(row, SentencePair)]
    similar = EmbeddingSimilarityEvaluator(
        [row.first for row in rows], [row.second for row in rows], [row.value for row in rows], write_csv=False
    )
    value = score(embedder, file, tmp_path).value
    assert similar(judge)["spearman_cosine"] == pytest.approx(value, abs=CLOSE)


@each_file("classification")
def test_classification(models: Models, file: Path, tmp_path: Path) -> None:
    score(models[0], file, tmp_path)
