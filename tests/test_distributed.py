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
from conftest import save_tiny, write_pairs

HERE = Path(__file__).parent


def torchrun(*arguments: object, processes: int = 2) -> list[str]:
    """The command that starts several processes of a script or module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *map(str, arguments)]


def finish(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    found = {
        f"{name}-{optimizer}": steps_of_ranks.run(folder, settings, optimizer, shard=False)
        for name, settings in steps_of_ranks.SETTINGS.items()
        for optimizer in ("sgd", "adamw")
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
            scale = max(1e-3, float(value.abs().max()))
            assert float((found[key] - value).abs().max()) <= 1e-5 * scale, (name, key)


def recipe(tmp_path: Path, folder: Path, output: str, steps: int = 6) -> Path:
    pairs = tmp_path / "pairs.jsonl"
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
        "model": {"name": str(folder), "precision": "float32", "device": "cpu"},
        "reconstruct": stage,
        "contrast": stage | {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}},
        "output": str(tmp_path / output),
    }
    path = tmp_path / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script or ``-m module`` in one process or several."""
    return finish([sys.executable, *map(str, arguments)] if processes == 1 else torchrun(*arguments))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, tiny_folder: Path) -> None:
    whole = start(1, "-m", "anchorembed", "train", recipe(tmp_path, tiny_folder, "whole"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    for output, first, second in (("two-one", 2, 1), ("one-two", 1, 2)):
        path = recipe(tmp_path, tiny_folder, output)
        stopped = start(first, HERE / "stopped_run.py", path)
        assert "Stopped after step 3" in stopped.stderr, stopped.stderr[-2000:]
        done = start(second, "-m", "anchorembed", "train", path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "resumed after step 3 of 6" in done.stderr
        for stage in ("reconstruct", "contrast"):
            expected, found = (
                load_file(tmp_path / run / stage / "model" / "model.safetensors") for run in ("whole", output)
            )
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
            log = (tmp_path / output / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line)["step"] for line in log] == list(range(1, 7))


def test_a_dead_process_takes_the_run_down(tmp_path: Path, tiny_folder: Path) -> None:
    path = recipe(tmp_path, tiny_folder, "killed", steps=100_000)
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
