"""Two processes = one: losses, gradients and weights, by DDP and by sharding; runs go on with another number."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import steps_of_ranks
from tiny import save_tiny, write_pairs

HERE = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.slow


def torchrun(*arguments: object, processes: int = 2) -> list[str]:
    """The command that starts several processes of a script or module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *map(str, arguments)]


def finish(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])  # this checkout's, whatever is installed
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "tied")
    save_tiny(folder / "untied", "llama-untied")
    found = {
        name: steps_of_ranks.run(steps_of_ranks.model_of(folder, name), settings, shard=False)
        for name, settings in steps_of_ranks.SETTINGS.items()
    }
    return folder, found


@pytest.mark.parametrize("how", ["ddp", "shard"])
def test_two_processes_are_one(
    alone: tuple[Path, dict[str, dict[str, torch.Tensor]]], how: str, tmp_path: Path
) -> None:
    folder, expected = alone
    done = finish(torchrun(HERE / "steps_of_ranks.py", folder, tmp_path, how))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "finished-1").exists()
    for name, values in expected.items():
        found = load_file(tmp_path / name)
        assert set(found) == set(values)
        for key, value in values.items():
            away = float((found[key] - value).norm()) / max(1e-3, float(value.norm()))
            assert away <= 1e-5, (name, key)


def recipe(folder: Path, output: str, steps: int = 6) -> Path:
    """A recipe in the folder of its model and pairs."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs, 80)
    stage = {"steps": steps, "batch_size": 8, "warmup_steps": 1, "save_every": 2, "evaluate_every": 3}
    values = {
        "data": {
            "sources": [{"name": "p", "path": str(pairs)}],
            "query_tokens": 24,
            "document_tokens": 48,
            "held_out": 8,
        },
        "model": {"name": str(folder / "model"), "precision": "float32", "device": "cpu"},
        "reconstruct": stage,
        "contrast": stage | {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}},
        "output": str(folder / output),
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script or ``-m module`` in one process or several."""
    return finish([sys.executable, *map(str, arguments)] if processes == 1 else torchrun(*arguments))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one process, and the folder of its model and pairs."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder / "model")
    done = start(1, "-m", "anchorembed", "train", recipe(folder, "whole"))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, folder / "whole"


def same_run(folder: Path, expected: Path, output: str) -> None:
    """The weights and the steps of a run are those of another."""
    for stage in ("reconstruct", "contrast"):
        wanted, found = (load_file(run / stage / "model" / "model.safetensors") for run in (expected, folder / output))
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
        log = (folder / output / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, 7))


@pytest.mark.parametrize(("output", "first", "second"), [("two-one", 2, 1), ("one-two", 1, 2), ("shards-one", 2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    whole: tuple[Path, Path], output: str, first: int, second: int
) -> None:
    folder, expected = whole
    path = recipe(folder, output)
    how = ["stop", "shard"] if output.startswith("shards") else ["stop"]
    stopped = start(first, HERE / "run_of_ranks.py", path, *how)
    assert "Stopped after step 3" in stopped.stderr, stopped.stderr[-2000:]
    done = start(second, "-m", "anchorembed", "train", path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after step 3 of 6" in done.stderr
    same_run(folder, expected, output)


def test_a_sharded_run_is_the_run_of_one_process(whole: tuple[Path, Path]) -> None:
    """Both stages as accelerate's FSDP2 prepares them: sharded weights and optimizer, gathered to be written."""
    folder, expected = whole
    done = start(2, HERE / "run_of_ranks.py", recipe(folder, "sharded"), "shard")
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(folder, expected, "sharded")


def test_a_dead_process_takes_the_run_down(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    path = recipe(tmp_path, "killed", steps=100_000)
    command = torchrun("-m", "anchorembed", "reconstruct", path)
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings, start_new_session=True) as run:
        log = tmp_path / "killed" / "reconstruct" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        psutil.Process(run.pid).children()[-1].kill()
        _, said = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "SIGKILL" in said or "exitcode" in said
