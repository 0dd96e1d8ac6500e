"""A training that was stopped, was killed or has other steps is told from a finished one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from anchorembed.compare import training
from anchorembed.compare.arms import READY_ARMS, before_recipe
from anchorembed.compare.plan import open_comparison
from anchorembed.compare.run import run
from anchorembed.errors import InputError
from anchorembed.model.metadata import METADATA
from anchorembed.recipe_schema import Recipe
from anchorembed.system.files import lock_folder
from anchorembed.train.loop import Interrupted

Make = Callable[..., Recipe]


def test_a_model_of_another_number_of_steps_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that was trained before the settings that decide its steps were changed."""

    def train(recipe: Recipe) -> None:
        (recipe.output / "reconstruct" / "model").mkdir(parents=True)
        (recipe.output / "reconstruct" / "model" / METADATA).write_text("{}", encoding="utf-8")
        (recipe.output / "reconstruct" / "log.jsonl").write_text('{"step": 6}\n', encoding="utf-8")

    monkeypatch.setattr(training, "_train", train)
    six, seven = (before_recipe(make(), READY_ARMS["both"], 0, steps, tmp_path) for steps in (6, 7))
    assert training.train_stage(six) == tmp_path / "reconstruct"
    with pytest.raises(
        InputError, match=r"its model was trained for 6 steps, this comparison asks for 7. Remove the folder"
    ):
        training.train_stage(seven)


@pytest.mark.slow
def test_a_signal_to_compare_alone_stops_its_training_too(make: Make, tmp_path: Path) -> None:
    """The training writes a checkpoint and ends, and what is run again goes on from there."""
    number = signal.SIGHUP
    recipe = make(arms=["both"], declared=[])
    slow = recipe.reconstruct.model_copy(update={"steps": 100_000, "evaluate_every": 0})
    recipe = recipe.model_copy(update={"reconstruct": slow})
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    command = [sys.executable, "-m", "anchorembed", "compare", str(path)]
    before = signal.signal(number, lambda *_: None)  # one that is ignored here, as under nohup, is so in a child, too
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        signal.signal(number, before)
        deadline = time.monotonic() + 120
        logs = "run/*/*/*/before/reconstruct/log.jsonl"
        while not any(log.stat().st_size for log in tmp_path.glob(logs)) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its training, too
    assert process.returncode == 128 + number, error
    assert "Stopped. To continue: anchorembed compare" in error
    (stage,) = tmp_path.glob("run/*/*/*/before/reconstruct")
    assert list(stage.glob("checkpoints/step-*"))
    with lock_folder(stage):
        pass  # nobody is at work there any more


def test_signals_that_ask_to_stop_are_caught_and_passed_on_once() -> None:
    """But for those that are ignored, as under nohup; the training is sent SIGTERM, and its exit code is waited for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
    try:
        with (
            training._caught_signals() as caught,
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process,
        ):
            process.stdout.readline()  # it is ready
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert caught == [signal.SIGTERM, signal.SIGINT]
            assert training._wait(process, caught) == 7
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, interrupted)


@pytest.mark.parametrize("code", [143, -signal.SIGTERM])
def test_a_stopped_training_raises_interrupted(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Whether the training could still write a checkpoint or was not ready for signals yet."""
    monkeypatch.setattr(training, "_wait", lambda process, _: (process.kill(), code)[1])
    with pytest.raises(Interrupted) as raised:
        run(open_comparison(make(arms=["both"], declared=[]), tmp_path))
    assert raised.value.signal == signal.SIGTERM


def test_a_killed_training_is_reported_with_a_cure(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_wait", lambda process, _: (process.kill(), -signal.SIGKILL)[1])
    with pytest.raises(
        InputError, match=r"recipe\.yaml: its training was killed, .*memory.* Lower the stage's tokens_per_micro_batch"
    ):
        run(open_comparison(make(arms=["both"], declared=[]), tmp_path))
