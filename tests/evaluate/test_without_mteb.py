"""Local tests of every form are evaluated, trained by and compared where mteb is not installed.

Each check runs in a process of its own; there, and in those that it starts, the packages are hidden (`without.py`).
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import WORDS, write_pairs

ROOT = Path(__file__).parents[2]
HIDDEN = ("mteb", "polars", "lancedb")
KINDS = ["Retrieval", "Reranking", "STS", "PairClassification", "Classification"]
RECIPE = """
data: {{sources: [{{name: p, path: pairs.jsonl}}], query_tokens: 16, document_tokens: 24, held_out: 4}}
model: {{name: {model}, precision: float32, device: cpu}}
reconstruct: {{steps: 2, batch_size: 4, warmup_steps: 1}}
contrast: {{steps: 2, batch_size: 4, warmup_steps: 1, evaluate_every: 1, evaluate_on: [tests, beir]}}
output: run
compare: {{arms: [base, both], declared: [], seeds: [0], collections: {{T: [tests, beir]}}}}
"""


@pytest.fixture
def data(tmp_path: Path, tiny_folder: Path) -> Path:
    """A BEIR folder, a folder with a test file of each other kind, pairs and a recipe."""
    rng = random.Random(0)

    def write(name: str, rows: list[dict[str, object]]) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=4))

    write("beir/corpus.jsonl", [{"_id": str(n), "text": text()} for n in range(30)])
    write("beir/queries.jsonl", [{"_id": f"q{n}", "text": text()} for n in range(9)])
    (tmp_path / "beir" / "qrels").mkdir()
    judgements = "".join(f"q{n}\t{n}\t1\n" for n in range(9))
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}")
    write("tests/a_test.jsonl", [{"query": text(), "positive": [text()], "negative": [text()]} for _ in range(9)])
    write("tests/b_test.jsonl", [{"sentence1": text(), "sentence2": text(), "score": n % 5} for n in range(20)])
    write("tests/c_test.jsonl", [{"sentence1": text(), "sentence2": text(), "label": n % 2} for n in range(20)])
    for part in ("train", "test"):
        write(f"tests/d_{part}.jsonl", [{"text": text(), "label": f"l{n % 2}"} for n in range(20)])
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_folder), encoding="utf-8")
    return tmp_path


def hidden(folder: Path, names: tuple[str, ...], *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command line where packages are hidden from it and from all that it starts."""
    hiding = folder / "hiding"
    hiding.mkdir(exist_ok=True)
    (hiding / "sitecustomize.py").write_text(f"from without import hide\nhide(*{names!r})\n", encoding="utf-8")
    path = os.pathsep.join(map(str, (hiding, ROOT / "tests" / "helpers", ROOT / "src")))
    environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "anchorembed", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_every_local_form_is_evaluated(data: Path, tiny_folder: Path) -> None:
    done = hidden(data, HIDDEN, "evaluate", tiny_folder, "beir", "tests", "--json", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == KINDS
    assert {path.stem for path in (data / "out").rglob("*.json")} == {
        *("beir", "model_meta"),
        *(f"{x}_test" for x in "abcd"),
    }


def test_training_and_comparing_measure(data: Path) -> None:
    done = hidden(data, HIDDEN, "compare", "recipe.yaml", "--results", "results")
    assert done.returncode == 0, done.stderr
    (log,) = data.glob("run/*/both-*/seed-0/*/contrast/log.jsonl")
    measured = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    assert {"beir nDCG@10", "a_test MAP", "b_test Spearman", "c_test AP", "d_test accuracy"} <= set(measured)
    lines = [json.loads(line) for line in (data / "results" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line["kind"] == "cell"]) == 2 * len(KINDS)
    assert (data / "results" / "report.html").exists()


def test_a_package_that_is_needed_would_be_missed(data: Path, tiny_folder: Path) -> None:
    """So what is hidden is hidden."""
    done = hidden(data, ("sklearn",), "evaluate", tiny_folder, "beir", "tests")
    line = "sklearn: this package is not installed. To install it: pip install 'anchorembed[eval]'"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, line), done.stderr


def test_a_task_by_name_says_what_to_install(data: Path, tiny_folder: Path) -> None:
    done = hidden(data, HIDDEN, "evaluate", tiny_folder, "SciFact")
    line = (
        "SciFact: neither a folder nor a file here, and tasks by name are mteb's. "
        "mteb: this package is not installed. To install it: pip install 'anchorembed[mteb]'"
    )
    assert (done.returncode, done.stderr.splitlines()[-1], done.stdout) == (2, line, "")
