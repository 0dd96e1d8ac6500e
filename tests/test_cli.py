"""The command line from recipe to answers on a tiny model, and one clear message for every kind of bad input."""

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from typer.main import get_command

import anchorembed
from anchorembed.cli import main, recipes, root, terminal
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_schema import Schedule
from anchorembed.train import checkpoint, loop
from anchorembed.train.default_recipe import default_contrast
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.reconstruction_batch import ReconstructionBatch
from anchorembed.train.stage import Measured
from embeddings_server import Broken, serving
from tiny import write_pairs

Run = Any
DISK = ". Check the path, its rights and the disk."


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anchorembed", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    stage = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "evaluate_every": 2, "learning_rate": 1e-3}
    values = {
        "data": {"sources": [{"name": "p", "path": str(pairs)}], "query_tokens": 24, "document_tokens": 48},
        "model": {"name": str(tiny_folder), "device": "cpu"},
        "reconstruct": stage,
        "contrast": stage,
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": f"title {i}", "text": f"sort the list {i}"} for i in range(12)]
    queries = [{"_id": f"q{i}", "text": f"list {i}"} for i in range(3)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(3))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_profile_says_what_it_measured(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("profile", recipe, "--steps", 1)
    assert code == 0, err
    for words in ("reconstruct: ", "contrast: ", "pair tokens/s", "TFLOP/s", "matrix products"):
        assert words in out
    peaks = re.findall(r"peak memory (\S+) GB", out)
    assert [float(peak) > 0 for peak in peaks] == [True, True]
    for stage in ("reconstruct", "contrast"):
        assert f"{stage}: about " in err, "the memory it takes is said"
    shares = [float(line.split("%")[0]) for line in out.splitlines() if line.lstrip()[0].isdigit() and "%  " in line]
    assert sum(shares) == pytest.approx(200, abs=1)
    assert not (tmp_path / "run").exists()
    program = (
        "from anchorembed.train.profile import _profiled as w, torch\nwith w({}, torch.device('cpu')): torch.ones(2)"
    )
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (alone.stdout, alone.stderr) == ("", ""), "the profiler says nothing itself"
    code, _, err = run("profile", recipe, "--stage", "third")
    assert code == 2
    assert "'third'" in err


def test_a_profile_of_no_stage_is_refused(run: Run, recipe: Path) -> None:
    code, out, err = run("profile", recipe, "--set", "reconstruct=null", "--set", "contrast=null")
    assert (code, out, "both reconstruct and contrast are null" in err) == (2, "", True)


def test_isotropy_of_several_models(run: Run, recipe: Path, tiny_folder: Path, tmp_path: Path) -> None:
    code, *_ = run("isotropy", tiny_folder, "--pairs", tmp_path / "pairs.jsonl", "--most", 10**30)
    assert code == 0, "more pairs than any computer counts are all there are"
    code, out, err = run("isotropy", tiny_folder, f"{tiny_folder}/", "--pairs", tmp_path / "pairs.jsonl", "--most", 20)
    assert code == 0, err
    head, first, second = out.splitlines()
    assert head.split()[:4] == ["mean", "cosine", "effective", "rank"]
    assert first == second.removesuffix("/")
    mean, rank, alignment, _ = map(float, first.split()[:4])
    assert -1 < mean <= 1
    assert 1 <= rank <= 20
    assert 0 <= alignment <= 4


def test_read_prints_what_two_vectors_say(run: Run, tiny_folder: Path) -> None:
    code, out, err = run("read", tiny_folder, "sort a list", "--other", "open [a] file")
    assert code == 0, err
    assert out.count("likeliest words: ") == out.count("the decoder writes: ") == 2
    assert "that of 'open [a] file'" in out
    assert "nats a token" in out.splitlines()[-1]
    code, out, err = run("read", tiny_folder, "sort a list", "--json")
    assert code == 0, err
    assert {"own", "against", "ratio", "is_read"} <= json.loads(out).keys()
    code, out, err = run("read", tiny_folder)
    assert (code, out) == (2, "")
    assert "a text is missing" in err


@pytest.mark.slow
def test_pairs_without_a_recipe(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pairs, output = write_pairs(tmp_path / "faq.jsonl"), tmp_path / "faq"
    command = ["train", "--pairs", pairs, "--base", tiny_folder, "--output", output, "--set", "data.query_tokens=24"]
    code, _, err = run(*command, "--set", "contrast.steps=2")
    assert code == 0, err
    made = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert made["data"]["sources"][0]["name"] == "faq"
    assert (made["data"]["query_tokens"], made["contrast"]["steps"], made["reconstruct"]) == (24, 2, None)
    assert (output / "contrast" / "model" / "README.md").is_file()
    code, _, err = run("train", output / "recipe.yaml")
    assert code == 0, err
    assert "finished before" in err
    code, _, err = run(*command)
    assert (code, "contrast.steps is 2 there, 30 here" in err) == (2, True), "the recipe that is there is another"


def test_pairs_are_checked_without_a_recipe(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, output = write_pairs(tmp_path / "faq.jsonl", 12), tmp_path / "faq"
    pairs.write_text(f"{pairs.read_text(encoding='utf-8')}broken\n", encoding="utf-8")
    command = ["check", "--pairs", pairs, "--base", tiny_folder, "--set", "data.query_tokens=8"]
    code, out, err = run(*command)
    assert code == 0, err
    for words in ("faq: 12 pairs", "are cut at 8", "not valid JSON"):
        assert words in out
    assert run(*command, "-o", output)[:2] == (0, out)
    monkeypatch.setenv("BASES", str(tiny_folder.parent))
    assert run(*command, "--base", f"$BASES/{tiny_folder.name}")[:2] == (0, out), "read as in a recipe"
    assert not output.exists()
    assert "and, to train, --output DIR" in run("check", "--pairs", pairs)[2]


def test_pairs_and_a_recipe_are_not_mixed(run: Run, recipe: Path, tmp_path: Path) -> None:
    for command in (["--pairs", "a.jsonl"], [recipe, "--base", "smollm2-135m"], ["--output", tmp_path / "x"]):
        code, _, err = run("train", *command)
        assert code == 2
        assert "or else all of --pairs FILE, --base MODEL and, to train, --output DIR" in err
    missing = ["--pairs", tmp_path / "none.jsonl", "--base", "smollm2-135m", "--output", tmp_path / "x"]
    code, _, err = run("train", *missing)
    assert code == 2
    assert "none.jsonl" in err
    assert not (tmp_path / "x").exists()


def test_steps_follow_the_number_of_pairs() -> None:
    steps = [default_contrast(pairs)["steps"] for pairs in (10, 1000, 10**6)]
    assert steps == [30, 94, 1000]


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"{anchorembed.__version__}\n")


@pytest.mark.slow
def test_recipe_to_answers(run: Run, recipe: Path, collection: Path, tmp_path: Path) -> None:
    code, _, err = run("train", recipe)
    assert code == 0, err
    model = tmp_path / "run" / "contrast" / "model"
    assert str(model) in err
    code, out, err = run("evaluate", model, collection, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["type"], found["metric"]) == ("Retrieval", "nDCG@10")
    assert 0 < found["value"] <= 1
    (tmp_path / "told.yaml").write_text("default: go\n", encoding="utf-8")
    code, out, err = run(
        "evaluate", model, collection, "--instructions", tmp_path / "told.yaml", "--quick", "-o", tmp_path / "results"
    )
    assert code == 0, err
    assert out.split()[:3] == [f"{collection.name}-quick", "Retrieval", "nDCG@10"]
    assert len(list((tmp_path / "results").rglob(f"{collection.name}-quick.json"))) == 1
    code, out, err = run("export", model, tmp_path / "export")
    assert code == 0, err
    assert SentenceTransformer(str(tmp_path / "export"), device="cpu").encode_query(["x"]).shape == (1, 32)
    for word in ("built", "reused"):
        code, out, err = run("search", model, collection / "corpus.jsonl", "list 3", "--top-k", 2, "--json")
        assert code == 0, err
        assert word in err
        assert [json.loads(line)["rank"] for line in out.splitlines()] == [1, 2]
    code, out, err = run("search", model, collection / "corpus.jsonl", "list 3", "--index", tmp_path / "index")
    assert (code, len(out.splitlines())) == (0, 10)
    code, _, err = run(
        "encode", model, collection / "corpus.jsonl", "-o", tmp_path / "vectors.parquet", "--side", "query"
    )
    assert code == 0, err
    table = pq.read_table(tmp_path / "vectors.parquet")
    assert table.column("id").to_pylist() == [f"d{i}" for i in range(12)]
    assert len(table.column("vector")[0]) == 32
    code, _, err = run("train", recipe)
    assert (code, err.count("finished before")) == (0, 2)


def test_the_verbs_as_functions_take_plain_strings(recipe: Path, collection: Path, tmp_path: Path) -> None:
    model = str(anchorembed.contrast(anchorembed.read_recipe(str(recipe))))
    corpus = str(collection / "corpus.jsonl")
    (score,) = anchorembed.evaluate(model, [str(collection)])
    assert score.scores["test"][0]["recall_at_100"] == 1.0
    assert anchorembed.encode(model, corpus, str(tmp_path / "v.parquet")) == 12
    assert len(anchorembed.search(model, corpus, "list", index=str(tmp_path / "index"), top_k=4).hits) == 4
    assert anchorembed.export(model, str(tmp_path / "export")) > 0.9999


@pytest.mark.slow
def test_smaller_vectors(run: Run, tiny_folder: Path, collection: Path, tmp_path: Path) -> None:
    corpus, out = collection / "corpus.jsonl", tmp_path / "v.parquet"
    code, shown, err = run("evaluate", tiny_folder, collection, "--dimensions", "16", "--precision", "int8,binary")
    assert code == 0, err
    assert [line.split()[:3] for line in shown.splitlines()[2:]] == [
        ["32", "float32", "128"],
        ["16", "int8", "16"],
        ["16", "binary", "2"],
    ]
    code, shown, err = run("evaluate", tiny_folder, collection, "--dimensions", "16", "--json")
    assert code == 0, err
    sizes = [[json.loads(line)[key] for key in ("dimensions", "precision", "bytes")] for line in shown.splitlines()]
    assert sizes == [[32, "float32", 128], [16, "float32", 64]]
    code, _, err = run("encode", tiny_folder, corpus, "-o", out, "--dimensions", 16, "--precision", "binary")
    assert code == 0, err
    assert len(pq.read_table(out).column("vector")[0]) == 2
    code, shown, err = run("search", tiny_folder, corpus, "list 3", "--dimensions", 16, "--precision", "int8", "--json")
    assert code == 0, err
    assert len(shown.splitlines()) == 10
    for arguments, fault in (
        (("evaluate", tiny_folder, collection, "--precision", "int8,bits"), "--precision: 'bits' is unknown"),
        (("evaluate", tiny_folder, collection, "--dimensions", "16,x"), "--dimensions: '16,x' is not whole numbers"),
        (("search", tiny_folder, corpus, "list", "--dimensions", 33), "--dimensions: 33 is above 32"),
        (("encode", tiny_folder, corpus, "-o", out, "--dimensions", 0), "--dimensions: 0 is below 1"),
        (("encode", tiny_folder, corpus, "-o", out, "--dimensions", 9, "--precision", "binary"), "no multiple of 8"),
        (("encode", tiny_folder, corpus, "-o", out, "--like", corpus), "Give a file that encode wrote"),
    ):
        code, _, err = run(*arguments)
        assert (code, fault in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.slow
def test_stages_alone(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, _, err = run("contrast", recipe, "--set", f"output={tmp_path / 'alone'}", "--set", "contrast.lora=null")
    assert code == 0, err
    assert not (tmp_path / "alone" / "reconstruct").exists()
    assert run("reconstruct", recipe)[0] == 0
    code, _, err = run("contrast", recipe)
    assert code == 0
    assert f"starting from {tmp_path / 'run' / 'reconstruct' / 'model'}" in err


def test_show_config(run: Run, recipe: Path) -> None:
    code, out, _ = run("train", recipe, "--show-config", "--set", "seed=11")
    assert (code, yaml.safe_load(out)["seed"]) == (0, 11)
    code, _, err = run("train", "--show-config", "--set", "seed=11")
    assert (code, "a recipe is needed" in err) == (2, True), "changes of nothing are not left out silently"
    code, out, _ = run("train", "--show-config")
    assert code == 0
    assert "d2q_weight: 0.8" in out


BAD_LINES = {
    "not-json": ("{nope", "pairs.jsonl:3"),
    "empty": ('{"query": "q", "positive": " "}', 'pairs.jsonl:3: "positive" is empty'),
    "wrong-type": ('{"query": 4, "positive": "p"}', "pairs.jsonl:3"),
    "missing-column": ('{"qurey": "q", "positive": "p"}', "pairs.jsonl:3"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line(run: Run, recipe: Path, tmp_path: Path, case: str) -> None:
    line, expected = BAD_LINES[case]
    pairs = tmp_path / "pairs.jsonl"
    rows = pairs.read_text(encoding="utf-8").splitlines()
    pairs.write_text("\n".join([*rows[:2], line, *rows[2:]]) + "\n", encoding="utf-8")
    code, _, err = run("train", recipe)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists(), "nothing is half-written"
    code, _, err = run("reconstruct", recipe, "--skip-bad")
    assert code == 0
    assert "p: 1 line dropped: " in err
    assert "First on line 3." in err


WRONG_RECIPES = {
    "unknown-key": ("contrast.temprature=1", "unknown key 'contrast.temprature'"),
    "nearest": ("contrast.learning_rat=1", "Did you mean 'learning_rate'?"),
    "wrong-type": ("contrast.steps=many", "contrast.steps is 'many'"),
    "no-gpu": ("model.device=cuda:99", "cuda:99"),
    "no-file": ("data.sources=[{name: a, path: nowhere.jsonl}]", "nowhere.jsonl: no such file"),
    "no-model": ("model.name=./nowhere", "'./nowhere': no such folder"),
    "no-room": ("data.query_tokens=2", "data.query_tokens: 2 leaves no room"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_a_wrong_recipe(run: Run, recipe: Path, case: str, tmp_path: Path) -> None:
    override, expected = WRONG_RECIPES[case]
    code, _, err = run("train", recipe, "--set", override)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_file_without_pairs(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n", encoding="utf-8")
    code, _, err = run("train", recipe)
    assert code == 2
    assert "no usable pair" in err


@pytest.mark.slow
def test_missing_files_of_other_verbs(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    for arguments in (
        ("evaluate", tiny_folder, tmp_path / "none"),
        ("encode", tiny_folder, tmp_path / "none.jsonl", "-o", tmp_path / "x.parquet"),
        ("search", tiny_folder, tmp_path / "none.jsonl", "words"),
        ("export", tmp_path / "none", tmp_path / "out"),
        ("train", tmp_path / "none.yaml"),
        ("train",),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert err.strip()
        assert "Traceback" not in err
    assert f"{tmp_path}: is a folder. Name a JSONL" in run("search", tiny_folder, tmp_path, "words")[2]
    assert list(tmp_path.glob("x*")) == []


def test_an_output_that_cannot_be_written_is_one_message(run: Run, recipe: Path, tmp_path: Path) -> None:
    """A file stands where the run folder should go."""
    (tmp_path / "run").write_text("in the way", encoding="utf-8")
    code, _, err = run("train", recipe)
    assert code == 2
    assert "run" in err
    assert "Traceback" not in err


def test_a_full_disk_is_one_message(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = run("train", recipe, "--set", "reconstruct.save_every=2")
    assert code == 2
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "run" / "reconstruct").glob("checkpoints/*")] == []


@pytest.mark.parametrize(
    ("rank", "printed"), [(None, ["p:100: [bold]", "slow"]), ("0", ["p:100: [bold]", "slow"]), ("1", ["slow"])]
)
def test_messages_are_printed_once_and_as_they_are(
    rank: str | None, printed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first of several processes; the others print warnings alone."""
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    root._show_messages()
    root._show_messages()
    log = logging.getLogger("anchorembed.data.store")
    log.debug("hidden")
    log.info("p:100: [bold]")
    log.warning("slow")
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", printed)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_print_a_character_is_no_traceback(tmp_path: Path, encoding: str) -> None:
    pairs, out = tmp_path / "\N{SNOWMAN}.jsonl", tmp_path / "\N{GRINNING FACE}.jsonl"
    write_pairs(pairs, 4)
    command = [sys.executable, "-m", "anchorembed", "mine", str(pairs), "-o", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).splitlines()[-1] == str(out).encode("ascii", "backslashreplace").decode()
    done = subprocess.run(
        [*command[:4], f"{pairs}.gone", *command[5:]], capture_output=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert b"no such file or folder" in done.stderr


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", "\\u2603"), ("utf-8", "\N{SNOWMAN}")])
def test_json_is_json_on_every_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    terminal.print_json({"text": "\N{SNOWMAN}\N{GRINNING FACE}", "value": float("nan")})
    sys.stdout.flush()
    assert expected in written.getvalue().decode(encoding)
    assert json.loads(written.getvalue()) == {"text": "\N{SNOWMAN}\N{GRINNING FACE}", "value": None}


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("anchorembed")
    result = subprocess.run(
        [command, "--help"], capture_output=True, text=True, check=True, env=os.environ | {"NO_COLOR": "1"}
    )
    for verb in ("train", "reconstruct", "contrast", "evaluate", "encode", "search", "export"):
        assert verb in result.stdout


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_where_memory_ends_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert "not enough memory" in capsys.readouterr().err
    monkeypatch.setattr(main, "memory_ended", lambda _: False)
    with pytest.raises(type(error)):
        main.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
        (OSError("no such model"), "OSError: no such model"),
        (OSError(28, "No space left"), f"a file: No space left{DISK}"),
        (OSError("9 requested and 5 written"), f"a file: 9 requested and 5 written{DISK}"),
        (OSError(13, "Denied", "f"), f"f: Denied{DISK}"),
        (InputError("pairs.jsonl:100: [bold]"), "pairs.jsonl:100: [bold]"),
    ],
)
def test_only_an_error_of_files_names_the_disk(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == f"{said}\n"


def test_memory_that_ends_in_a_step_is_one_message(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Reconstruction.run, count()

    def failing(self: Reconstruction, batch: ReconstructionBatch) -> Measured:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch)

    monkeypatch.setattr(Reconstruction, "run", failing)
    code, _, err = run("reconstruct", recipe)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "reconstruct: memory ended after step 2: CUDA out of memory. Tried to allocate 2.00 GiB. Set "
    )
    assert last.endswith(f"Steps up to 2 are kept. To continue: anchorembed reconstruct {recipe}")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_stopped_says_how_to_go_on(
    run: Run, recipe: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: what is typed again ends it."""
    real, sent = loop.learning_rate, []

    def rate(step: int, schedule: Schedule) -> float:
        if step == 2 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        return real(step, schedule)

    monkeypatch.setattr(loop, "learning_rate", rate)
    code, _, err = run("reconstruct", recipe)
    assert code == 128 + number
    assert err.strip().endswith(f"Stopped after step 3. To continue: anchorembed reconstruct {recipe}")
    assert "Traceback" not in err
    code, _, err = run("reconstruct", recipe)
    assert code == 0
    assert "resumed after step 3 of 4" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert terminal.typed_command() == f"the same launcher with -m anchorembed reconstruct {recipe}"


def test_ctrl_c_elsewhere_is_no_traceback(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("anchorembed.export.run"), "export", stop)
    code, _, err = run("export", tiny_folder, "out")
    assert code == 130
    assert err == f"Stopped. To start again: anchorembed export {tiny_folder} out\n"


def test_ctrl_c_during_imports_is_silent() -> None:
    program = (
        "import runpy, sys\n"
        "class Stopped:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopped())\n"
        "runpy.run_module('anchorembed', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_continues_is_a_verb() -> None:
    assert set(get_command(root.app).commands) >= root.CONTINUED  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["train", "reconstruct", "profile", "check"])
def test_ctrl_c_before_anything_begins_says_so(
    run: Run, recipe: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the recipe and importing torch take seconds, in which nothing is trained yet.

    Only verbs that go on from what is finished are said to continue.
    """

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "read_recipe", stop)
    code, _, err = run(verb, recipe)
    how = "To start again" if verb in ("profile", "check") else "Nothing that was finished is lost. To continue"
    assert (code, err) == (130, f"Stopped. {how}: anchorembed {verb} {recipe}\n")
    assert not (recipe.parent / "run").exists()


@pytest.mark.slow
def test_verify_says_whether_served_vectors_are_the_models(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    model = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(100, 100))
    model.save(tmp_path / "model")
    with serving(Broken(model, 100, before="<s>")) as url:
        code, out, _ = run("verify", tmp_path / "model", url)
        assert (code, out.splitlines()[-1]) == (0, "The vectors agree.")
        assert re.search(r"^over-long +1\.000000 +1\.000000$", out, re.MULTILINE)
    with serving(Broken(model, 100, before="<s>", after="", cut="refuse")) as url:
        code, out, _ = run("verify", tmp_path / "model", url, "--skip", "long")
        assert code == 1
        assert "cause: EOS missing ('</s>'), in documents and queries\ncure:  Serve an exported folder" in out
        assert re.search(r"^over-long +refused +refused$", out, re.MULTILINE)
        code, out, _ = run("verify", tmp_path / "model", url, "--json")
        report = json.loads(out)
        assert (code, report["agrees"]) == (1, False)
        assert [cause["what"] for cause in report["causes"]] == ["EOS missing", "refuses over-long text"]
        assert {probe["cosine"] for probe in report["probes"] if probe["refused"]} == {None}
    assert run("verify", tmp_path / "model", "http://127.0.0.1:1", "--timeout", "1e300")[0] == 2
    code, _, err = run("verify", tmp_path / "model", tmp_path / "model")
    assert (code, "An exported folder needs --with" in " ".join(err.split())) == (2, True)
