"""Low-rank adapters on a model's linear modules, by peft."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters (Hu et al., 2022) on the named linear modules."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


class AdapterDropout(nn.Module):
    """Dropout before adapters, in the dtype of the products that follow rather than the wider one of their input.

    On the CPU, where torch draws one random number an element, 16 bits of one decide: a third of Stage II's time.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share ``rate`` of x and scale the rest by 1 / (1 - rate)."""
        if not self.training:
            return x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.rate)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= round(self.rate * 2**16) - 2**15
        return x * (kept.to(x.dtype) * (1 / (1 - self.rate)))


def adapted(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put adapters on a model, in place, with `AdapterDropout` before them."""
    with warnings.catch_warnings():  # peft asks transformers in a way that transformers deprecates
        warnings.simplefilter("ignore", FutureWarning)
        adapted: PeftModel = get_peft_model(model, config)
    for module in adapted.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for name, dropout in dropouts.items():
            if isinstance(dropout, nn.Dropout):  # else there is none
                dropouts[name] = AdapterDropout(dropout.p)
    return adapted
