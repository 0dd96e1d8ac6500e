"""AdamW over the weights that train, and each step's learning rate: warm-up, then decay."""

import math

import torch
from torch import nn

from anchorembed.recipe_schema import Schedule


def make_optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Fused AdamW over the weights that train."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the decay to zero after the last step."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return schedule.learning_rate
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    factor = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.learning_rate * factor
