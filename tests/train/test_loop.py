"""The loop on a single weight: rates, clipping, evaluations, the log, and the checkpoint that is kept."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from anchorembed.errors import OutOfMemory
from anchorembed.recipe_schema import Schedule
from anchorembed.train.loop import Loop, fit, read_log
from anchorembed.train.optimizer import learning_rate


class Weight(torch.nn.Module):
    """One number to train."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))


class Run:
    """``fit`` on one weight whose gradient is ``gradient``; what it was given and what it wrote."""

    def __init__(
        self, folder: Path, gradient: float = -1.0, qualities: tuple[float | Exception, ...] = (), **settings: object
    ) -> None:
        self.module, self.folder = Weight(), folder
        self.rates: list[float] = []
        self.values: list[float] = []
        self.asked: list[int] = []
        self.evaluated: list[bool] = []
        given = iter(qualities)
        schedule = Schedule.model_validate(
            {"steps": 6, "warmup_steps": 2, "learning_rate": 1.0, "batch_size": 2} | settings
        )
        optimizer = torch.optim.SGD(self.module.parameters(), lr=123.0)

        def prepare(number: int, indices: list[int]) -> tuple[int, dict[str, float]]:
            assert indices == [2 * number, 2 * number + 1]
            return number, {"tokens": 10.0 * number}

        def step(number: int) -> dict[str, torch.Tensor]:
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.values.append(self.module.value.item())
            self.module.value.grad = torch.tensor(gradient)
            return {"loss": torch.tensor(float(number))}

        def order(first: int) -> Iterator[list[int]]:
            self.asked.append(first)
            yield from ([2 * number, 2 * number + 1] for number in range(first, 100))

        def evaluate() -> dict[str, float]:
            self.evaluated.append(self.module.training)
            quality = next(given, 0.0)
            if isinstance(quality, Exception):
                raise quality
            return {"quality": quality}

        loop = Loop("stage", schedule, 0, folder, str, {})
        fit(loop, self.module, optimizer, Accelerator(cpu=True), prepare, step, order, evaluate)
        self.values.append(self.module.value.item())
        self.log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_step_has_its_rate_and_a_gradient_above_the_norm_is_clipped(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", gradient=-8.0, max_gradient_norm=0.5, evaluate_every=0)
    schedule = Schedule(steps=6, warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate(number, schedule) for number in range(6)]
    assert run.rates == rates
    moved = [after - before for before, after in zip(run.values, run.values[1:], strict=False)]
    assert moved == pytest.approx([0.5 * rate for rate in rates], rel=1e-4)  # not 8
    assert [entry["gradient_norm"] for entry in run.log] == [8.0] * 6
    assert [entry["learning_rate"] for entry in run.log] == pytest.approx(rates)
    below = Run(tmp_path / "b", gradient=-0.25, max_gradient_norm=0.5, evaluate_every=0)
    assert below.values[-1] == pytest.approx(0.25 * sum(rates))


def test_evaluations_come_when_asked_for_and_after_the_last_step_without_dropout(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", evaluate_every=4)
    assert [entry["step"] for entry in run.log if "quality" in entry] == [4, 6]
    assert run.evaluated == [False, False]
    assert run.module.training
    assert [entry["step"] for entry in run.log] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "learning_rate", "gradient_norm", "seconds"} <= entry.keys() for entry in run.log)
    assert [(entry["loss"], entry["tokens"]) for entry in run.log] == [(number, 10 * number) for number in range(6)]
    assert Run(tmp_path / "b", evaluate_every=0).evaluated == []


@pytest.mark.parametrize(("qualities", "kept"), [((0.2, 0.9, 0.4), 4), ((0.5, 0.5, 0.5), 2), ((0.1, 0.2, 0.3), 6)])
def test_the_first_best_evaluation_is_kept_if_asked_for(
    tmp_path: Path, qualities: tuple[float, ...], kept: int, said: list[str]
) -> None:
    best = Run(tmp_path / "best", qualities=qualities, evaluate_every=2, keep_best=True)
    last = Run(tmp_path / "last", qualities=qualities, evaluate_every=2)
    assert best.values[-1] == last.values[kept]
    assert last.values[-1] == last.values[6]
    assert f"stage: kept step {kept}, whose quality is {max(qualities):.4f}" in said


def test_undefined_qualities_choose_nothing_and_are_not_in_the_log(tmp_path: Path, said: list[str]) -> None:
    undefined = Run(tmp_path / "none", qualities=(math.nan,) * 3, evaluate_every=2, keep_best=True)
    assert undefined.values[-1] == undefined.values[6]
    assert said[-1] == "stage: no evaluation has a defined quality, so the last step is kept"
    assert not any("quality" in entry for entry in undefined.log)
    some = Run(tmp_path / "some", qualities=(0.2, math.nan, 0.1), evaluate_every=2, keep_best=True)
    assert some.values[-1] == some.values[2]


@pytest.mark.parametrize(
    ("patience", "qualities", "steps"),
    [
        (1, (0.2, 0.1, 0.9), [1, 2, 3, 4]),
        (2, (0.2, 0.1, 0.9), [1, 2, 3, 4, 5, 6]),
        (1, (0.2, 0.2), [1, 2, 3, 4]),
        (1, (math.nan, 0.1, 0.2), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_training_stops_once_quality_has_not_risen_for_long(
    patience: int, qualities: tuple[float, ...], steps: list[int], tmp_path: Path
) -> None:
    run = Run(tmp_path, qualities=qualities, evaluate_every=2, patience=patience, save_every=2)
    assert [entry["step"] for entry in run.log] == steps
    resumed = Run(tmp_path, qualities=(1.0,) * 3, evaluate_every=2, patience=patience, save_every=2)
    assert [entry["step"] for entry in resumed.log] == steps, "what has stopped stays so"
    assert resumed.values[-1] == run.values[-1]


@pytest.mark.parametrize("last", [False, True])
def test_an_evaluation_in_which_memory_ends_is_the_first_when_resumed(tmp_path: Path, last: bool) -> None:
    settings = {"evaluate_every": 2, "keep_best": True}
    whole = Run(tmp_path / "whole", qualities=(0.9, 0.4, 0.5), **settings)
    failing = (0.9, 0.4, MemoryError()) if last else (MemoryError(),)
    with pytest.raises(OutOfMemory, match=f"Steps up to {6 if last else 2} are kept"):
        Run(tmp_path / "cut", qualities=failing, **settings)
    with pytest.raises(OutOfMemory, match="are kept"):  # once more
        Run(tmp_path / "cut", qualities=(MemoryError(),), **settings)
    resumed = Run(tmp_path / "cut", qualities=(0.5,) if last else (0.9, 0.4, 0.5), **settings)
    measured = {"seconds", "peak_gb"}
    resumed_log, whole_log = (
        [{name: value for name, value in entry.items() if name not in measured} for entry in run.log]
        for run in (resumed, whole)
    )
    assert resumed_log == whole_log
    assert all(measured <= entry.keys() for entry in resumed.log), "a step's cost is not lost"
    assert resumed.values[-1] == whole.values[-1]


def test_a_checkpoint_is_gone_on_from_with_the_pairs_that_come_next(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", evaluate_every=0)
    Run(tmp_path / "cut", evaluate_every=0, steps=4, decay="none", save_every=4)
    more = Run(tmp_path / "cut", evaluate_every=0, decay="none")
    assert whole.asked == [0]
    assert more.asked == [4]
    assert more.values[0] == pytest.approx(0.5 + 1 + 1 + 1)
    assert [entry["step"] for entry in more.log] == [1, 2, 3, 4, 5, 6]


def test_lines_of_a_log_that_a_crash_damaged_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00}\n\xff\xfe\n{"step": 3}\n{"step": 4, "lo')
    assert read_log(path) == [{"step": 1}, {"step": 3}]
    assert read_log(tmp_path / "none.jsonl") == []
