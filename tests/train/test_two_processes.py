"""Two processes = one: losses, gradients and weights, by DDP and by sharding; runs go on with another number."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import steps_of_ranks
from run_of_ranks import train_recipe
from tiny import recipe_values, save_tiny, write_pairs

HERE = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.slow


def torchrun(*arguments: object) -> list[str]:
    """The command that starts two processes of a script or module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Variables of a process: this checkout's package and helpers, whatever is installed, and one thread."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, pairs, recipes, a whole run of one process and one that it has left, and all that two processes do."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "tied")
    save_tiny(folder / "untied", "llama-untied")
    save_tiny(folder / "biased", "phi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANCHOREMBED_CACHE", str(folder / "cache"))
        assert train_recipe(recipe(folder, "whole")) == ""
        assert train_recipe(recipe(folder, "one-two"), stop=True) == "Stopped after step 3."
        for output in ("two-one", "sharded", "shards-one"):
            recipe(folder, output)
        done = finish(torchrun(HERE / "run_of_ranks.py", folder))
        assert done.returncode == 0, done.stderr[-3000:]
        assert (folder / "finished-1").exists()
        assert [line for line in done.stderr.splitlines() if ": Stopped" in line] == [
            "two-one: Stopped after step 3.",
            "shards-one: Stopped after step 3.",
        ]
        yield folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The steps of one process."""
    return {
        name: steps_of_ranks.run(steps_of_ranks.model_of(folder, name), schedule, shard=False)
        for name, schedule in steps_of_ranks.SETTINGS.items()
    }


BOUNDS = {"stage1-read-alone": 3e-5}  # its gradients are small differences of losses: 1.1e-5 with AVX2


@pytest.mark.parametrize("how", ["ddp", "shard"])
def test_two_processes_are_one(folder: Path, alone: dict[str, dict[str, torch.Tensor]], how: str) -> None:
    for name, values in alone.items():
        found = load_file(folder / how / name)
        assert set(found) == set(values)
        for key, value in values.items():
            away = float((found[key] - value).norm()) / max(1e-3, float(value.norm()))
            assert away <= BOUNDS.get(name, 1e-5), (name, key)


def recipe(folder: Path, output: str, steps: int = 6) -> Path:
    """A recipe in the folder of its model and pairs."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs, 80)
    stage = {"steps": steps, "batch_size": 8, "warmup_steps": 1, "save_every": 2, "evaluate_every": 3}
    stages = {"reconstruct": stage, "contrast": stage | {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}}}
    path = folder / f"{output}.yaml"
    text = yaml.safe_dump(recipe_values(pairs, folder / "tied", folder / output) | stages)
    path.write_text(text, encoding="utf-8")
    return path


def same_run(folder: Path, output: str) -> None:
    """The weights and the steps of a run are those of one process."""
    for stage in ("reconstruct", "contrast"):
        wanted, found = (
            load_file(run / stage / "model" / "model.safetensors") for run in (folder / "whole", folder / output)
        )
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
        log = (folder / output / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, 7))


@pytest.mark.parametrize("output", ["two-one", "shards-one"])
def test_one_process_goes_on_with_a_run_of_two(folder: Path, output: str, said: list[str]) -> None:
    assert train_recipe(folder / f"{output}.yaml") == ""
    assert "reconstruct: resumed after step 3 of 6" in said
    same_run(folder, output)


def test_two_processes_go_on_with_a_run_of_one(folder: Path) -> None:
    done = finish(torchrun("-m", "anchorembed", "train", folder / "one-two.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after step 3 of 6" in done.stderr
    same_run(folder, "one-two")


def test_a_sharded_run_is_the_run_of_one_process(folder: Path) -> None:
    """Both stages as accelerate's FSDP2 prepares them: sharded weights and optimizer, gathered to be written."""
    same_run(folder, "sharded")


def test_a_dead_process_takes_the_run_down(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tied")
    path = recipe(tmp_path, "killed", steps=100_000)
    command = torchrun("-m", "anchorembed", "reconstruct", path)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True) as run:
        log = tmp_path / "killed" / "reconstruct" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        psutil.Process(run.pid).children()[-1].kill()
        _, said = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "SIGKILL" in said or "exitcode" in said
