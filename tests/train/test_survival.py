"""Nothing lost, nothing half-written: kills, a full disk, data and recipes that change under a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from anchorembed.errors import InputError
from anchorembed.train.run import contrast, reconstruct
from survivor import recipe
from without import ROOT, python

LIMITED = """
import resource, sys
from anchorembed.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_never_killed() -> None:
    done = python(ROOT / "tests" / "helpers" / "survivor.py", 20)
    assert done.returncode == 0, done.stderr
    survived = json.loads(done.stdout)
    assert survived["equal"]
    assert survived["kills"] == 20
    assert survived["while_writing"] >= 3


@pytest.mark.slow
def test_a_quota_reached_while_writing_loses_nothing(tmp_path: Path) -> None:
    """No file may grow beyond what a checkpoint needs: the run stops with one message and goes on once it may."""
    run = recipe(tmp_path, "limited", 6)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    command = [sys.executable, "-c", LIMITED, "20000", "reconstruct", str(path)]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"})
    assert stopped.returncode == 2, stopped.stderr
    assert "File too large" in stopped.stderr or "cannot be written" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    left = [place.name for place in run.output.rglob("*") if place.name.startswith((".", "step-"))]
    assert left == []
    finished = load_file(reconstruct(run) / "model.safetensors")
    undisturbed = load_file(reconstruct(recipe(tmp_path, "whole", 6)) / "model.safetensors")
    assert all(finished[name].equal(undisturbed[name]) for name in undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody may write")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    run = recipe(tmp_path, "unused", 2).model_copy(update={"output": Path("/proc/anchorembed")})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    command = [sys.executable, "-m", "anchorembed", "reconstruct", str(path)]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2, stopped.stderr
    assert "/proc/anchorembed" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_data_that_changed_under_a_started_run_is_named(tmp_path: Path) -> None:
    run = recipe(tmp_path, "changed", 4)
    reconstruct(run)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(pairs.read_text(encoding="utf-8") + '{"query": "new", "positive": "pair"}\n', encoding="utf-8")
    changed = "reconstruct: the pairs of p changed since training began"
    with pytest.raises(InputError, match=rf"{changed}\.\nRestore the pairs, choose another output"):
        reconstruct(run)
    other = run.model_copy(update={"seed": 5})
    with pytest.raises(InputError, match=rf"{changed}\.\n.*seed was 0, is 5 now\.\nRestore the recipe and the pairs,"):
        reconstruct(other)
    pairs.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match=r"seed was 0, is 5 now\.\nRestore the recipe,"):
        reconstruct(other)
    assert contrast(run.model_copy(update={"output": tmp_path / "fresh"})).exists()
