"""The optimizer and the learning rate of each step, by hand."""

import pytest
import torch

from anchorembed.recipe_schema import Schedule
from anchorembed.train.optimizer import learning_rate, make_optimizer


def test_learning_rate_by_hand() -> None:
    schedule = Schedule(steps=10, warmup_steps=2, learning_rate=1.0)
    assert [learning_rate(step, schedule) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])
    assert learning_rate(6, Schedule(steps=10, warmup_steps=2, learning_rate=1.0, decay="cosine")) == pytest.approx(0.5)
    assert learning_rate(9, Schedule(steps=10, warmup_steps=2, learning_rate=1.0, decay="none")) == 1.0


def test_weights_decay_as_the_schedule_says() -> None:
    groups = make_optimizer(torch.nn.Linear(2, 1), Schedule(weight_decay=0.25, learning_rate=0.5)).param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.25, 0.5)]
