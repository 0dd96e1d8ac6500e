"""A file of each type of test, and an embedder's scores on it."""

import json
import random
from pathlib import Path

from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.tasks import TaskEmbedder, TaskScore, run_tasks
from anchorembed.model.embedder import Embedder
from anchorembed.search.vector_cache import VectorCache
from tiny import WORDS

FILES = {  # type of task -> where it is in the folder
    "Retrieval": "beir",
    "Reranking": "rerank/r_test.jsonl",
    "STS": "sts/s_test.jsonl",
    "PairClassification": "pairs.jsonl",
    "Classification": "classes/c_test.jsonl",
}


def words(rng: random.Random, count: int = 4) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_beir(
    folder: Path, documents: list[dict[str, object]], queries: list[dict[str, object]], qrels: list[str]
) -> None:
    write_rows(folder / "corpus.jsonl", documents)
    write_rows(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_test_files(folder: Path) -> Path:
    """A graded BEIR folder whose query ids are document ids, too, and a test file of each other type."""
    rng = random.Random(0)
    write_beir(
        folder / "beir",
        [{"_id": f"d{n}", "title": "", "text": words(rng)} for n in range(40)],
        [{"_id": f"d{n}", "text": words(rng, 3)} for n in range(12)],
        [f"d{n}\td{m}\t{1 if m == n else rng.choice([0, 1, 2])}" for n in range(12) for m in {n, n + 5, n + 20}],
    )
    write_rows(
        folder / "rerank" / "r_test.jsonl",
        [
            {"query": words(rng), "positive": [words(rng), words(rng)], "negative": [words(rng, 5) for _ in range(4)]}
            for _ in range(9)
        ],
    )
    write_rows(
        folder / "sts" / "s_test.jsonl",
        [{"sentence1": words(rng), "sentence2": words(rng), "score": rng.choice([0, 1.5, 3, 5])} for _ in range(30)],
    )
    write_rows(
        folder / "pairs.jsonl",
        [{"sentence1": words(rng), "sentence2": words(rng), "label": n % 2} for n in range(20)],
    )
    for part, count in (("train", 60), ("test", 24)):
        rows: list[dict[str, object]] = [{"text": words(rng), "label": rng.choice("ab")} for _ in range(count)]
        write_rows(folder / "classes" / f"c_{part}.jsonl", rows)
    return folder


def task_embedder(embedder: Embedder, folder: Path, instructions: dict[str, str] | None = None) -> TaskEmbedder:
    return TaskEmbedder(VectorCache(embedder, folder / "vectors"), "tiny", instructions or {})


def scores(embedder: Embedder, folder: Path, *names: Path, quick: bool = False) -> list[TaskScore]:
    return list(run_tasks(task_embedder(embedder, folder), find_tasks([str(name) for name in names], quick=quick)))
