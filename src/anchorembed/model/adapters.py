"""LoRA: low-rank adapters (Hu et al., 2022) on the linear modules of a backbone's model, by peft."""

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchorembed.errors import InputError
from anchorembed.model.backbone import Backbone
from anchorembed.model.load import quiet


class AdapterDropout(nn.Module):
    """Dropout before adapters, in the dtype of the products that follow, not the wider one of their input.

    torch draws a random number for each element, which on the CPU takes a third of Stage II's time. Here each element
    takes 16 bits of one.
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


def add_lora(backbone: Backbone, rank: int, alpha: int, dropout: float, targets: Iterable[str]) -> None:
    """Freeze all weights, and add adapters, scaled by alpha / rank, to the linear modules named in ``targets``.

    Raises:
        InputError: if the model has no such module.
    """
    modules = adaptable(backbone.model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules)
    backbone.peft.append(_adapted(backbone.model, config))


def merge_lora(backbone: Backbone) -> None:
    """Add the adapters, if there are any, to the weights they adapt; 4-bit weights become bfloat16 first."""
    if getattr(backbone.model, "is_loaded_in_4bit", False):
        _dequantize(backbone)
    while backbone.peft:
        backbone.model = backbone.peft.pop().merge_and_unload()


def adaptable(model: PreTrainedModel, targets: Iterable[str], key: str = "lora.targets") -> list[str]:
    """Return those of ``targets`` that are names of linear modules in the model's layers; ``key`` is the recipe's key.

    The output head is left out: losses use its weight itself, so adapters on it would do nothing.

    Raises:
        InputError: if none is.
    """
    names = {
        name.rsplit(".", 1)[-1] for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    matching = [name for name in targets if name in names]
    if not matching:
        raise InputError(
            f"{key}: the model has none of {', '.join(targets)}. Its linear modules are {', '.join(sorted(names))}."
        )
    return matching


def not_adapted(model: PreTrainedModel) -> list[str]:
    """Names of the linear modules and experts in a model's layers that have no adapters."""
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    names = [*(name for name in linear if "lora_" not in name), *(name for name, _ in expert_weights(model))]
    return sorted({name.rsplit(".", 1)[-1] for name in names} - {"base_layer"})


def expert_weights(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Weights of all experts of a layer, [experts, out, in], by name: transformers has them in no linear module."""
    return [(name, weight) for name, weight in model.base_model.named_parameters() if weight.ndim == 3]


def _adapted(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put adapters on a model, in place, with `AdapterDropout` before them."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft calls what transformers deprecates
        peft: PeftModel = get_peft_model(model, config)
    for module in peft.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for name, dropout in dropouts.items():
            if isinstance(dropout, nn.Dropout):  # at rate 0 it is an nn.Identity
                dropouts[name] = AdapterDropout(dropout.p)
    return peft


def _dequantize(backbone: Backbone) -> None:
    """Turn 4-bit weights into bfloat16 ones of the same values, and put the adapters back on them."""
    adapters = [(peft.peft_config["default"], get_peft_model_state_dict(peft)) for peft in backbone.peft]
    while backbone.peft:
        backbone.model = backbone.peft.pop().unload()
    with quiet():
        backbone.model.dequantize(torch.bfloat16)
    setattr(backbone.model, "is_loaded_in_4bit", False)  # noqa: B010 - not an attribute of all models
    for config, weights in adapters:
        peft = _adapted(backbone.model, config)
        set_peft_model_state_dict(peft, weights)
        backbone.peft.append(peft)
