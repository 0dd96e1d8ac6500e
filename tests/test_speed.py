"""The scripts of speed/ load, and the one for GPUs runs whole in its toy form on a CPU."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
