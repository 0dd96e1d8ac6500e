"""From documents without queries to a verdict, by a stand-in endpoint; a killed run goes on; bad input is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anchorembed.cli.main import app
from anchorembed.curate.docstrings import collect_docstrings
from anchorembed.curate.prompt import default_prompt
from anchorembed.data.beir import read_collection
from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError
from anchorembed.fit import Fitted, Writing, fit, recipe_of
from anchorembed.recipe_file import read_recipe
from anchorembed.train.run import train
from chat_endpoint import Endpoint, chat_endpoint
from python_packages import write_packages
from without import ROOT

SMALL = ["contrast.steps=3", "contrast.batch_size=8", "data.query_tokens=24", "data.document_tokens=48"]
SMALL += ["model.device=cpu", "model.precision=float32"]


def write(turn: str) -> str:
    """Two queries by words of the document; for each tenth document one is a copy."""
    words = re.findall(r"w\d+x\d+", turn)
    if "5x" in words[0]:
        return f"how is {words[3]} made\n{' '.join(words[:8])}"
    return f"1. how is {words[3]} made\n2. {words[5]} or {words[9]}"


def docstring_corpus(folder: Path, count: int = 60) -> Path:
    documents, _ = collect_docstrings(write_packages(folder / "site"))
    rows = [{"_id": each.name, "text": each.positive} for each in documents[:count]]
    rows += [{"_id": "empty", "text": " "}, {"_id": "again", "text": documents[0].positive}]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(
    folder: Path, base: Path, endpoint: Endpoint, *overrides: str, corpus: Path | None = None, **writing: Any
) -> Fitted:
    corpus = corpus or folder / "corpus.jsonl"
    return fit(
        corpus if corpus.exists() else docstring_corpus(folder),
        str(base),
        folder / "out",
        writing=Writing(url=endpoint.url, model="m", **writing),
        overrides=[*SMALL, *overrides],
    )


@pytest.mark.slow
def test_from_documents_to_a_verdict(
    tmp_path: Path, tiny_folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_endpoint(write) as endpoint:
        fitted = made(tmp_path, tiny_folder, endpoint)
        assert len(endpoint.asked) == 60
        assert any("2 documents are empty or the same as another" in line for line in said)
        pairs = list(read_pairs(tmp_path / "out" / "data" / "pairs.jsonl"))
        collection = read_collection(tmp_path / "out" / "data" / "held-out-documents")
        assert (fitted.pairs, fitted.test_queries) == (len(pairs), len(collection.queries))
        assert len(collection.documents) == 60
        assert len(collection.queries) == 12, "a fifth, one query of each"
        texts = {document.id: document.text for document in collection.documents}
        held_out = {texts[document] for grades in collection.qrels.values() for document in grades}
        assert not held_out & {pair.positive for pair in pairs}
        for query in collection.queries:
            (document,) = collection.qrels[query.id]
            assert re.findall(r"w\d+x\d+", query.text)[0] in texts[document]
        assert fitted.pairs + fitted.dropped["its document is not found again"] <= 2 * 48
        assert fitted.dropped["copies its document"] == 6
        assert fitted.dropped["fewer than 2 words"] == 0
        verdict = json.loads((tmp_path / "out" / "verdict.json").read_text(encoding="utf-8"))
        (test,) = verdict["tests"]
        assert test["items"] == 12
        assert test["bm25"] == 1.0, "each query has words of its document alone"
        assert any(line.startswith("verdict on held-out-documents, 12 queries") for line in said)
        before = [line for line in said if "verdict on" in line or "than" in line]
        said.clear()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert made(Path("~"), tiny_folder, endpoint, corpus=tmp_path / "corpus.jsonl").model == fitted.model
        assert len(endpoint.asked) == 60, "nothing is written twice"
        assert not Path("~").exists(), "data and models are in the same folder"
        assert [line for line in said if "verdict on" in line or "than" in line] == before
    said.clear()
    assert train(read_recipe(fitted.recipe)) == fitted.model, "the recipe is one, and the run is its run"
    assert any(line.startswith("verdict on held-out-documents") for line in said)
    assert "dropped: copies its document" in str(fitted)


@pytest.mark.slow
def test_what_no_search_finds_is_not_trained_on(tmp_path: Path, tiny_folder: Path) -> None:
    def vague(turn: str) -> str:
        return f"{write(turn)}\nzebra crossing {re.findall(r'w[0-9]+', turn)[0]}"

    with chat_endpoint(vague) as endpoint:
        by_words = made(tmp_path, tiny_folder, endpoint, count=3, found_in=1)
        assert by_words.dropped["its document is not found again"] == 48
        queries = [pair.query for pair in read_pairs(tmp_path / "out" / "data" / "pairs.jsonl")]
        assert not [query for query in queries if "zebra" in query]
        corpus = tmp_path / "corpus.jsonl"
        other = fit(
            corpus,
            str(tiny_folder),
            tmp_path / "other",
            writing=Writing(endpoint.url, "m", count=3, found_by=str(tiny_folder), found_in=5),
            overrides=[*SMALL, f"output={tmp_path / 'elsewhere'}"],
        )
    assert (other.recipe, other.recipe.is_file()) == (tmp_path / "elsewhere" / "recipe.yaml", True)
    assert other.pairs < by_words.pairs, "an untrained model finds less"


@pytest.mark.slow
def test_a_recipe_that_the_user_changed_is_kept(tmp_path: Path, tiny_folder: Path) -> None:
    with chat_endpoint(write) as endpoint:
        fitted = made(tmp_path, tiny_folder, endpoint)
        text = fitted.recipe.read_text(encoding="utf-8")
        fitted.recipe.write_text(text.replace("steps: 3", "steps: 4"), encoding="utf-8")
        with pytest.raises(InputError, match=r"makes: contrast\.steps is 4 there, 3 here\. To train"):
            made(tmp_path, tiny_folder, endpoint)
    assert "steps: 4" in fitted.recipe.read_text(encoding="utf-8")


@pytest.mark.slow
def test_pairs_that_a_model_was_trained_on_are_not_overwritten(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out, other = docstring_corpus(tmp_path), tmp_path / "out", tmp_path / "other"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(lines[:40]), encoding="utf-8")
    with chat_endpoint(write) as endpoint:
        made(tmp_path, tiny_folder, endpoint)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "queries.jsonl"}
        corpus.write_text("".join(lines[:44]), encoding="utf-8")
        with pytest.raises(
            InputError, match=r"contrast: trained on other pairs .* or delete \S+contrast and \S+yaml\."
        ):
            made(tmp_path, tiny_folder, endpoint)
        assert len(endpoint.asked) == 44
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "queries.jsonl"}
        assert after == before
        assert train(read_recipe(out / "recipe.yaml")) == out / "contrast" / "model", "it is still complete"
        (other / "data").mkdir(parents=True)
        shutil.copy(out / "data" / "queries.jsonl", other / "data")
        shutil.rmtree(out / "contrast")
        (out / "recipe.yaml").unlink()
        assert made(tmp_path, tiny_folder, endpoint).model == out / "contrast" / "model"
        monkeypatch.setattr("anchorembed.fit.train", lambda recipe: recipe.output)
        fit(corpus, str(tiny_folder), other, writing=Writing(endpoint.url, "m"), overrides=SMALL)
        assert len(endpoint.asked) == 44, "nothing is asked for twice"


@pytest.mark.parametrize(("pairs", "batch", "steps"), [(2, 2, 30), (61, 15, 30), (1000, 32, 94), (100_000, 32, 1000)])
def test_the_recipe_is_as_long_as_the_pairs_are_many(pairs: int, batch: int, steps: int, tmp_path: Path) -> None:
    recipe = recipe_of("smollm2-135m", tmp_path, pairs, ["contrast.scale=30"])
    assert recipe.contrast is not None
    assert (recipe.contrast.batch_size, recipe.contrast.steps, recipe.contrast.scale) == (batch, steps, 30)
    assert recipe.reconstruct is None


@pytest.mark.slow
def test_queries_of_no_use_are_counted_in_the_refusal(tmp_path: Path, tiny_folder: Path) -> None:
    with (
        chat_endpoint(lambda _: "what is it") as endpoint,
        pytest.raises(
            InputError, match=r"0 queries to train on .* of 60 documents \(60 dropped: same as another query"
        ),
    ):
        made(tmp_path, tiny_folder, endpoint)
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = docstring_corpus(tmp_path)
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n", encoding="utf-8")
    without_weights = Path(
        shutil.copytree(tiny_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    )

    def refused(message: str, path: Path = corpus, base: Path = tiny_folder, *overrides: str, **writing: Any) -> None:
        with pytest.raises(InputError, match=message):
            fit(path, str(base), tmp_path / "out", writing=Writing(**writing), overrides=overrides)
        assert not (tmp_path / "out").exists()

    refused("2 different documents. Give at least 10", few)
    refused("no such file", tmp_path / "nothing.jsonl")
    refused("cannot be loaded|no such folder", corpus, tmp_path / "nothing")
    with chat_endpoint(write) as endpoint:
        refused("no such folder", found_by=str(tmp_path / "nothing"), url=endpoint.url, model="m")
        refused("cannot be loaded", corpus, without_weights, url=endpoint.url, model="m")
        assert endpoint.asked == []
    refused("unknown key 'contrast.stepz'", corpus, tiny_folder, "contrast.stepz=3")
    refused("give both", url="http://127.0.0.1:1/v1")
    refused("--queries: 0 is below 1", count=0)
    refused("--temperature: 9", temperature=9.0)
    refused("its last turn", prompt=few)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("run it in one process, then train elsewhere.recipe.yaml", corpus, tiny_folder, "output=elsewhere")


def test_the_command_prints_the_prompt_and_names_what_is_missing(tmp_path: Path, tiny_folder: Path) -> None:
    printed = CliRunner().invoke(app, ["fit", "--print-prompt"])
    assert (printed.exit_code, printed.output.strip()) == (0, default_prompt().strip())
    missing = CliRunner().invoke(app, ["fit", str(docstring_corpus(tmp_path)), "--output", str(tmp_path / "out")])
    assert missing.exit_code == 2
    assert "--base" in missing.output


@pytest.mark.slow
def test_a_killed_run_asks_again_for_its_last_batch_alone(tmp_path: Path, tiny_folder: Path) -> None:
    corpus, stuck = docstring_corpus(tmp_path), threading.Event()

    def slow(turn: str) -> str:
        if len(endpoint.asked) > 40:
            stuck.wait(30)
        return write(turn)

    with chat_endpoint(slow) as endpoint:
        sets = [part for change in SMALL for part in ("--set", change)]
        command = [sys.executable, "-m", "anchorembed", "fit", str(corpus), "--base", str(tiny_folder)]
        command += ["--output", str(tmp_path / "out"), "--writer", endpoint.url, "--writer-model", "m", *sets]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while len(endpoint.asked) <= 40 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        stuck.set()
        first = len(endpoint.asked)
        assert len((tmp_path / "out" / "data" / "queries.jsonl").read_bytes().splitlines()) == 32
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(endpoint.asked) - first == 60 - 32
    assert "pairs to train on" in done.stdout
    assert "verdict on held-out-documents" in done.stderr
    assert "queries written for 28 documents (32 had theirs)" in done.stdout


@pytest.mark.slow
@pytest.mark.default_model
def test_the_default_model_writes_and_is_trained(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    verbs, things = ("sort", "merge", "rename", "delete", "print"), ("list", "table", "folder", "photo")
    lines = [f"To {verb} a {thing}, choose it in the menu and press {verb[0]}." for verb in verbs for thing in things]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    overrides = ["contrast.steps=2", "contrast.batch_size=4", "data.document_tokens=48", "data.query_tokens=32"]
    fitted = fit(corpus, "smollm2-135m", tmp_path / "out", writing=Writing(count=1), overrides=overrides)
    assert fitted.written.tokens_out > 20
    assert fitted.pairs >= 4, fitted
    assert (tmp_path / "out" / "verdict.json").exists()


def test_an_id_that_judgements_cannot_hold_is_refused_before_queries_are_written(
    tmp_path: Path, tiny_folder: Path
) -> None:
    rows = [{"_id": f"document\t{number}", "text": f"text {number}"} for number in range(10)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="has a tab or line break"):
        fit(corpus, str(tiny_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
