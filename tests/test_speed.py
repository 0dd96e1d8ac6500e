"""The scripts of speed/ load, and run whole at toy size on a CPU."""

import gzip
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_tiny, write_pairs

SPEED = Path(__file__).parents[1] / "speed"


@pytest.mark.parametrize("script", sorted(SPEED.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_loads(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SPEED)
    spec = importlib.util.spec_from_file_location(f"speed_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert callable(getattr(module, "main", None)) or script.stem in {"common", "data", "ours", "theirs", "released"}


@pytest.fixture
def toy_data(tmp_path: Path) -> Path:
    """A tiny model in ``model``, and pairs where the scripts look for them."""
    save_tiny(tmp_path / "model")
    lines = write_pairs(tmp_path / "pairs.jsonl", 100).read_text(encoding="utf-8").splitlines()
    documents = [{"_id": str(number), "text": json.loads(line)["positive"]} for number, line in enumerate(lines)]
    for name, rows in (
        ("train/scifact_train.jsonl.gz", lines),
        ("test/scifact/corpus.jsonl.gz", map(json.dumps, documents)),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(gzip.compress("\n".join(rows).encode()))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "stage1 --batch 4 --steps 1 --warmup 0",
        "stage2 --batch 4 --steps 1 --warmup 1 --cached --mini-batch 4",
        "scaling --steps 1 --warmup 0 --most 8192 --most-words 49152 --long 512",
        "mining --seeds 1 --steps 1 --batch 4 --documents 60",
        "data --most 2000 --batch 8",
    ],
)
def test_a_benchmark_runs_whole_at_toy_size(toy_data: Path, command: str) -> None:
    name, *options = command.split()
    arguments = [*options, "--data", toy_data, "--model", toy_data / "model", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, SPEED / f"{name}.py", *arguments], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert json.loads(result.removeprefix("RESULT "))["benchmark"] == name


@pytest.mark.slow
def test_the_gpu_script_runs_whole_in_its_toy_form(tmp_path: Path) -> None:
    command = [sys.executable, SPEED / "gpu.py", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if "failed" in line or "skipped" in line] == []
    assert {"machine", "parity", "speed", "theirs", "ours", "syncs", "summary"} <= {line["what"] for line in lines}


@pytest.mark.slow
def test_a_comparison_is_asked_to_stop_when_time_is_up(tmp_path: Path) -> None:
    command = [sys.executable, SPEED / "gpu.py", "--tiny", "--parts", "compare", "--seconds", "41"]
    command += ["--data", tmp_path, "--out", tmp_path]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    (compared,) = (line for line in lines if line["what"] == "compare")
    assert compared["exit_code"] in (-signal.SIGTERM, 128 + signal.SIGTERM)
