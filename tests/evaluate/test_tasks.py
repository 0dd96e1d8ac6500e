"""Our scores are mteb's, ir-measures' and sentence-transformers'; items average to them; nothing is embedded twice."""

import hashlib
import json
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from mteb.abstasks import AbsTaskSTS
from mteb.cache import ResultCache
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from anchorembed.data import judged as testsets
from anchorembed.data.beir import read_collection
from anchorembed.data.store import open_corpus
from anchorembed.errors import InputError
from anchorembed.evaluate import find as tasks
from anchorembed.evaluate import metrics as scoring
from anchorembed.evaluate import mteb as mtebtasks
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.metrics import drawn, pseudo_values
from anchorembed.evaluate.mteb import Encoder, MtebTask
from anchorembed.evaluate.ranking import evaluate_collection
from anchorembed.evaluate.tasks import Adapter, TaskScore, check_instructions, read_instructions, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.model.export import export
from anchorembed.model.tokens import Lengths
from anchorembed.search.vector_cache import VectorCache
from judge import judged, mteb_task
from tiny import WORDS

CLOSE = 1e-6
PLACES = {
    "Retrieval": "beir",
    "Reranking": "rerank/r_test.jsonl",
    "STS": "sts/s_test.jsonl",
    "PairClassification": "pairs.jsonl",
    "Classification": "classes/c_test.jsonl",
}


def words(rng: random.Random, count: int = 4) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A graded BEIR folder whose query ids are document ids, too, and a test file of each other kind."""
    rng, folder = random.Random(0), tmp_path / "data"
    write(folder / "beir" / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": words(rng)} for n in range(40)])
    write(folder / "beir" / "queries.jsonl", [{"_id": f"d{n}", "text": words(rng, 3)} for n in range(12)])
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"d{n}\td{m}\t{1 if m == n else rng.choice([0, 1, 2])}" for n in range(12) for m in {n, n + 5, n + 20}]
    (folder / "beir" / "qrels").mkdir()
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write(
        folder / "rerank" / "r_test.jsonl",
        [
            {"query": words(rng), "positive": [words(rng), words(rng)], "negative": [words(rng, 5) for _ in range(4)]}
            for _ in range(9)
        ],
    )
    write(
        folder / "sts" / "s_test.jsonl",
        [{"sentence1": words(rng), "sentence2": words(rng), "score": rng.choice([0, 1.5, 3, 5])} for _ in range(30)],
    )
    write(
        folder / "pairs.jsonl",
        [{"sentence1": words(rng), "sentence2": words(rng), "label": n % 2} for n in range(20)],
    )
    for part, count in (("train", 60), ("test", 24)):
        rows: list[dict[str, object]] = [{"text": words(rng), "label": rng.choice("ab")} for _ in range(count)]
        write(folder / "classes" / f"c_{part}.jsonl", rows)
    return folder


def adapter(embedder: Embedder, folder: Path, instructions: dict[str, str] | None = None) -> Adapter:
    return Adapter(embedder, "tiny", VectorCache(embedder, folder / "vectors"), instructions or {})


def scores(embedder: Embedder, folder: Path, *names: Path, quick: bool = False) -> list[TaskScore]:
    return list(run_tasks(adapter(embedder, folder), find_tasks([str(name) for name in names], quick=quick)))


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
    place = data / PLACES[kind]
    (ours,) = scores(embedder, folder, place)
    theirs, unrounded = judged(place, adapter(embedder, folder))
    main = np.mean([*unrounded.values()]) if unrounded else theirs.scores["test"][0]["main_score"]
    assert not unrounded or set(unrounded) == set(ours.items)
    of_items = max((abs(value - ours.items[item]) for item, value in unrounded.items()), default=0.0)
    whole = {name: value for name, value in ours.scores["test"][0].items() if isinstance(value, float)}
    assert len(whole) > 2
    others = max(abs(value - theirs.scores["test"][0][name]) for name, value in whole.items())
    return abs(ours.value - main), of_items, others


@pytest.mark.parametrize("kind", PLACES)
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
    place = data / PLACES[kind]
    theirs, _ = judged(place, adapter(embedder, tmp_path))
    monkeypatch.setattr(scoring, name, fault)
    (ours,) = scores(embedder, tmp_path, place)
    assert abs(ours.value - theirs.value) > 1e-3


def test_classifiers_learn_from_the_texts_that_mteb_draws(data: Path) -> None:
    """Also where a label has fewer texts than are drawn."""
    labels = [*"aabbb", *"cccccccccccccccccccc", *"dddddddddddddddddddd"]
    task, before = mteb_task(data / PLACES["Classification"]), None
    train = Dataset.from_dict({"label": labels})
    for ours in drawn(labels):
        _, before, theirs = task._undersample_data(train, 0, before)
        assert ours == theirs
        assert len(ours) == 2 + 3 + 8 + 8


def test_a_corpus_is_never_held_in_memory(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "big" / "corpus.jsonl", [{"_id": str(n), "text": f"{n} " * 2000} for n in range(3000)])
    write(tmp_path / "big" / "queries.jsonl", [{"_id": "q", "text": "which"}])
    (tmp_path / "big" / "qrels").mkdir()
    (tmp_path / "big" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t7\t1\n", encoding="utf-8")
    size = (tmp_path / "big" / "corpus.jsonl").stat().st_size
    find_tasks([str(tmp_path / "big")])  # converts it; the rest must hold for a corpus that is there already as well
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    (task,) = find_tasks([str(tmp_path / "big")])
    lengths: list[int] = []

    def stream(texts: Iterable[str], *_: object, **__: object) -> Iterator[np.ndarray]:
        for text in texts:
            lengths.append(len(text))
            yield np.eye(1, 32, dtype=np.float32)

    monkeypatch.setattr(embedder, "stream", stream)
    list(run_tasks(adapter(embedder, tmp_path), [task]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(lengths) > 0.9 * size
    assert most + pa.total_allocated_bytes() - before < size / 3


@pytest.mark.parametrize("documents", [1, 3])
def test_a_revision_is_of_all_that_is_read(documents: int, tmp_path: Path) -> None:
    write(
        tmp_path / "c" / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "T", "text": f" it's {n}"} for n in range(documents)],
    )
    write(tmp_path / "c" / "queries.jsonl", [{"_id": "q", "text": "which"}])
    (tmp_path / "c" / "qrels").mkdir()
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n", encoding="utf-8")
    read = read_collection(tmp_path / "c")
    whole = "\n".join(map(repr, (read.documents, read.queries, read.qrels)))
    for quick in (False, True):
        (task,) = find_tasks([str(tmp_path / "c")], quick=quick)
        assert task.revision == hashlib.sha256(whole.encode()).hexdigest()
    stored = open_corpus(tmp_path / "c" / "corpus.jsonl", tmp_path)
    assert [*stored] == [*read.documents]
    assert stored.ids == [document.id for document in read.documents]


def test_the_demo_s_scores_are_those_of_a_task(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    (score,) = scores(embedder, tmp_path, data / "beir")
    collection = read_collection(data / "beir")
    ours = evaluate_collection(embedder, collection)
    assert ours.mean["Recall@100"] == pytest.approx(score.scores["test"][0]["recall_at_100"], abs=CLOSE)
    for query, value in score.items.items():
        assert ours.per_query[query]["nDCG@10"] == pytest.approx(value, abs=CLOSE)


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


def test_quick_is_a_fixed_part_and_says_so(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testsets, "QUICK_ITEMS", 10)
    monkeypatch.setattr(tasks, "QUICK_DOCUMENTS", 20)
    names = [data / "beir", data / "rerank", data / "sts", data / "classes"]
    first, second = (scores(embedder, tmp_path, *names, quick=True) for _ in range(2))
    assert [score.task for score in first] == ["beir-quick", "r_test-quick", "s_test-quick", "c_test-quick"]
    assert [score.items for score in first] == [score.items for score in second]
    assert [len(score.items) for score in first][1:] == [9, 10, 10]
    assert 0 < len(first[0].items) < 12


def test_instructions_go_where_they_should(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(80, 80))
    tasks = find_tasks([str(data / "beir"), str(data / "sts")])
    plain = list(run_tasks(adapter(embedder, tmp_path), tasks))
    told = list(run_tasks(adapter(embedder, tmp_path, {"STS": "compare these"}), tasks))
    assert told[0].value == plain[0].value
    assert told[1].value != plain[1].value
    collection = read_collection(data / "beir")
    queries = embedder.encode([query.text for query in collection.queries], "query", "find")
    documents = embedder.encode([document.text for document in collection.documents])
    best = {
        query.id: collection.documents[int(row.argmax())].id
        for query, row in zip(collection.queries, queries @ documents.T, strict=True)
    }
    local, run = mteb_task(data / "beir"), Encoder(adapter(embedder, tmp_path, {"beir": "find"}))
    run.index(Dataset.from_list([{"id": document.id, "text": document.text} for document in collection.documents]))
    rows = [{"id": query.id, "text": query.text} for query in collection.queries]
    found = run.search(rows, task_metadata=local.metadata, top_k=3)
    assert {query: next(iter(ranked)) for query, ranked in found.items()} == best
    with pytest.raises(InputError, match="'STSS' is no task here"):
        check_instructions({"STSS": "x"}, tasks)
    check_instructions({"STS": "x", "beir": "y", "default": "z"}, tasks)


def test_nothing_is_embedded_twice_and_results_are_kept(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tasks = find_tasks([str(data / "beir")])
    (first,) = run_tasks(adapter(embedder, tmp_path), tasks, out)
    (written,) = out.glob("results/anchorembed__tiny/*/beir.json")
    assert json.loads(written.read_text(encoding="utf-8"))["task_name"] == "beir"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(Embedder, "stream", refuse)
    (again,) = run_tasks(adapter(embedder, tmp_path), find_tasks([str(data / "beir")]))
    assert again.items == first.items
    (read,) = run_tasks(adapter(embedder, tmp_path / "elsewhere"), find_tasks([str(data / "beir")]), out)
    assert (read.value, read.items, read.scores) == (first.value, {}, first.scores)
    corpus = data / "beir" / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("sort", "read"), encoding="utf-8")
    with pytest.raises(AssertionError, match="embedded again"):
        list(run_tasks(adapter(embedder, tmp_path), find_tasks([str(data / "beir")]), out))


def test_mteb_reads_our_result_files(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    found = list(run_tasks(adapter(embedder, tmp_path), find_tasks([str(data / "sts"), str(data / "beir")]), tmp_path))
    (results,) = ResultCache(tmp_path).load_results(require_model_meta=True).model_results
    assert results.model_name == "anchorembed/tiny"
    read = {result.task_name: result for result in results.task_results}
    for score in found:
        assert read[score.task].get_score() == pytest.approx(score.value)


def test_a_result_cut_short_is_made_again(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out", [str(data / "sts")]
    (first,) = run_tasks(adapter(embedder, tmp_path), find_tasks(names), out)
    (written,) = out.glob("results/anchorembed__tiny/*/s_test.json")
    whole = written.read_text(encoding="utf-8")
    written.write_text(whole[: len(whole) // 2], encoding="utf-8")
    (again,) = run_tasks(adapter(embedder, tmp_path), find_tasks(names), out)
    assert again.items == first.items
    assert json.loads(written.read_text(encoding="utf-8"))["task_name"] == "s_test"


def test_scores_come_one_by_one(embedder: Embedder, data: Path, tmp_path: Path) -> None:
    tasks = find_tasks([str(data / "sts"), str(data / "beir")])
    assert next(run_tasks(adapter(embedder, tmp_path), tasks)).task == "s_test"
    assert [path.suffix for path in tmp_path.rglob("*.npy")] == [".npy"] * 2, "the second task was not begun"


def test_a_result_with_other_instructions_is_another(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(80, 80))
    values = [
        next(run_tasks(adapter(embedder, tmp_path, told), find_tasks([str(data / "sts")]), tmp_path / "out")).value
        for told in ({}, {"default": "compare these"}, {"default": "which is longer"}, {})
    ]
    assert len(set(values[:3])) == 3
    assert values[3] == pytest.approx(values[0], abs=5.1e-6)


def test_data_that_mteb_loads_itself_is_held_until_items_are_scored(
    embedder: Embedder, data: Path, tmp_path: Path
) -> None:
    local = mteb_task(data / PLACES["STS"])

    class Named(AbsTaskSTS):
        metadata = local.metadata

        def load_data(self, **_: object) -> None:
            self.dataset, self.data_loaded = local.dataset, True

    task = Named()
    (score,) = run_tasks(adapter(embedder, tmp_path), [MtebTask(task)])
    assert len(score.items) == 30
    assert not task.data_loaded


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionError("Couldn't reach 'mteb/stsbenchmark-sts' on the Hub"),
        RuntimeError("Couldn't reach data that a script makes"),
        DatasetGenerationError("Couldn't reach its rows"),
    ],
)
def test_a_task_whose_data_cannot_be_had_says_so(
    fault: Exception, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = find_tasks(["STSBenchmark"])

    def unreachable(**_: object) -> None:
        raise fault

    monkeypatch.setattr(task.task, "load_data", unreachable)
    with pytest.raises(InputError, match=r"STSBenchmark: its data cannot be had .*Couldn't reach.*Check the network"):
        next(run_tasks(adapter(embedder, tmp_path), [task]))


def test_a_task_with_rules_of_its_own_has_mteb_s_score_and_no_items(
    embedder: Embedder, data: Path, tmp_path: Path
) -> None:
    task = mteb_task(data / "beir")
    (kept,) = run_tasks(adapter(embedder, tmp_path), [MtebTask(task)])
    task.ignore_identical_ids = True
    (score,) = run_tasks(adapter(embedder, tmp_path), [MtebTask(task)])
    assert (len(kept.items), score.items) == (12, {})
    assert score.value == score.scores["test"][0]["main_score"] != pytest.approx(kept.value, abs=1e-4)


def test_a_damaged_vector_file_is_made_again(embedder: Embedder, tmp_path: Path) -> None:
    cache = VectorCache(embedder, tmp_path)
    first = np.array(cache.vectors(["a", "b"], "query", ""))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(cache.vectors(["a", "b"], "query", ""), first)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert cache.vectors([], "query", "").shape == (0, embedder.dimension)
    np.testing.assert_allclose(cache.vectors(["b", "a"], "query", ""), first[::-1], atol=1e-6)
    np.testing.assert_allclose(cache.vectors(["a", "b", ""], "query", "")[:2], first, atol=1e-6)


def test_pseudo_values_average_to_spearman() -> None:
    """By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4; without the last pair 1, 2.5, 2.5 against 1, 2, 3."""
    values = pseudo_values([0, 1, 1, 5], [0.1, 0.2, 0.3, 0.4])
    assert values.mean() == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    without = [spearmanr(np.delete([0, 1, 1, 5], i), np.delete([0.1, 0.2, 0.3, 0.4], i)).statistic for i in range(4)]
    np.testing.assert_allclose(values - values.mean(), 3 * (np.mean(without) - without))
    assert np.isnan(pseudo_values([1, 1, 1], [0.1, 0.2, 0.3])).all()


def test_pseudo_values_spread_as_the_correlation_does() -> None:
    """400 samples of 100 pairs of numbers that correlate by 0.8: their own spread is the one seen in each."""
    rng = np.random.default_rng(0)
    first_RN, noise_RN = rng.normal(size=(2, 400, 100))
    second_RN = 0.8 * first_RN + 0.6 * noise_RN
    samples = [pseudo_values(first, second) for first, second in zip(first_RN, second_RN, strict=True)]
    seen = np.std([values.mean() for values in samples])
    said = np.mean([values.std() / np.sqrt(len(values)) for values in samples])
    assert said == pytest.approx(seen, rel=0.1)


def test_a_part_of_a_reranking_task_of_mteb_has_its_own_queries_only(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = mteb_task(data / PLACES["Reranking"])
    monkeypatch.setattr(testsets, "QUICK_ITEMS", 3)
    monkeypatch.setattr(mteb, "get_task", lambda _: local)
    (score,) = run_tasks(adapter(embedder, tmp_path), find_tasks(["SomeReranking"], quick=True))
    assert (score.task, len(score.items)) == ("r_test-quick", 3)
    assert score.value == pytest.approx(score.scores["test"][0]["main_score"], abs=1e-4)


def test_a_part_of_a_retrieval_task_of_mteb_is_that_of_a_local_one(
    embedder: Embedder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tasks, mtebtasks):
        monkeypatch.setattr(module, "QUICK_DOCUMENTS", 20)
    monkeypatch.setattr(mteb, "get_task", lambda _: mteb_task(data / "beir"))
    ours, theirs = scores(embedder, tmp_path, data / "beir", quick=True) + scores(
        embedder, tmp_path, Path("SomeRetrieval"), quick=True
    )
    assert (ours.task, ours.items) == (theirs.task, theirs.items)


def test_what_is_no_task_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SciFakt: neither a folder or file here.*Did you mean 'SciFact'"):
        find_tasks(["SciFakt"])
    with pytest.raises(InputError, match="two tasks have this name"):
        find_tasks([str(data / "beir"), str(data / "beir")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a BEIR folder"):
        find_tasks([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="training texts beside it"):
        find_tasks([str(data / "classes" / "c_train.jsonl")])
    write(data / "classes" / "c_test.jsonl", [{"text": "x", "label": "unseen"}])
    with pytest.raises(InputError, match="'unseen' is in no training text"):
        find_tasks([str(data / "classes")])


def test_names_of_mteb_are_known() -> None:
    (task,) = find_tasks(["SciFact"])
    assert (task.name, task.kind, task.task.metadata.main_score) == ("SciFact", "Retrieval", "ndcg_at_10")
    assert len(find_tasks(["NanoBEIR"])) > 5


def test_instruction_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "instructions.yaml"
    path.write_text("default: Given a question\nSTS: Compare\n", encoding="utf-8")
    assert read_instructions(path) == {"default": "Given a question", "STS": "Compare"}
    for text in ("- a\n", "a: 1\n", "a: [\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"instructions\.yaml"):
            read_instructions(path)
