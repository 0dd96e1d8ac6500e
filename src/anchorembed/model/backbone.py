"""Run a decoder on packed sequences: ``f`` (vectors to states), ``E`` (embedding), ``W`` (head).

Any causal decoder of transformers with rotary positions works, because nothing of it is rewritten: only its attention
is swapped, through transformers' registry, for one that keeps packed sequences apart. Whether that, and the model's
scales and soft-caps, are reproduced is measured on loading; where not, it is refused by name.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchorembed.errors import InputError
from anchorembed.model.adapters import LoraSettings, adapted
from anchorembed.model.attention import ATTENTION
from anchorembed.model.load import quiet
from anchorembed.model.packing import PackedBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The output head ``W``: ``logits = cap(scale * (states @ weight.T + bias))``, cap(x) = c * tanh(x / c)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class Backbone(nn.Module):
    """A causal language model as three functions on packed tokens: ``embed`` (E), ``states`` (f), ``head`` (W)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.name = str(model.config.model_type)
        self.input_scale = 1.0
        self.logit_scale = 1.0
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.varlen = False  # attention by the varlen kernel rather than in buckets
        self.residual_dtype = self.stored  # of the stream that layers add to
        self.peft: list[PeftModel] = []  # in a list, so that its weights are registered once, under `model`
        model.set_attn_implementation(ATTENTION)

    @property
    def hidden_size(self) -> int:
        """H, the length of an embedding."""
        return int(self.head.weight.shape[1])

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the weights: float32, or bfloat16, also of what is beside 4-bit ones."""
        return self.head.weight.dtype

    @property
    def quantized(self) -> bool:
        """Whether linear modules have 4-bit weights."""
        return bool(getattr(self.model, "is_loaded_in_4bit", False))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def token_length(self) -> Tensor:
        """Mean Euclidean length of the input vectors of all tokens, without gradient."""
        weight_VH = cast("Tensor", self.model.get_input_embeddings().weight).detach().float()
        lengths_V: Tensor = weight_VH.norm(dim=-1)
        return lengths_V.mean() * self.input_scale

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return next(module for module in self.model.base_model.modules() if isinstance(module, nn.ModuleList))

    def embed(self, tokens_T: Tensor) -> Tensor:
        """E: token ids [T] to input vectors [T, H], in the scale in which an anchor enters."""
        module = self.model.get_input_embeddings()
        # Not by the module itself where it only looks rows up: it would keep a padding token's row from learning.
        vectors: Tensor = F.embedding(tokens_T, module.weight) if type(module) is nn.Embedding else module(tokens_T)
        return vectors if self.input_scale == 1.0 else vectors * self.input_scale

    def states(self, vectors_TH: Tensor, batch: PackedBatch) -> Tensor:
        """f: input vectors [T, H] to final states [T, H] after the last norm; ``batch`` says where sequences begin."""
        vectors_TH = vectors_TH if self.input_scale == 1.0 else vectors_TH / self.input_scale
        kernel = {"ends": batch.ends, "longest": batch.longest} if self.varlen else {"offsets": batch.offsets}
        first_1TH = torch.stack([vectors_TH.to(self.residual_dtype)])  # a view would be a graph of its own
        if self.peft and torch.is_grad_enabled() and not first_1TH.requires_grad:
            first_1TH.requires_grad_()  # as other layers' inputs do, so that the first layer shares their graph
        output = self.model.base_model(
            inputs_embeds=first_1TH,
            position_ids=batch.positions[None],
            use_cache=False,
            **kernel,
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    def recompute_layers(self) -> None:
        """Keep only each layer's input for the backward pass, which computes the rest again."""
        with warnings.catch_warnings():  # its other name is not in all versions of transformers that serve
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def head(self) -> Head:
        """W: the output head with the model's own scale and soft-cap."""
        linear = self.model.get_output_embeddings()
        return Head(linear.weight, getattr(linear, "bias", None), self.logit_scale, self.softcap)

    def freeze_own_head(self) -> None:
        """Freeze an output head with weights of its own: embedding does not use it."""
        head = self.model.get_output_embeddings()
        if head.weight is not self.model.get_input_embeddings().weight:
            head.requires_grad_(False)

    def add_lora(self, settings: LoraSettings) -> None:
        """Freeze all weights and add adapters on the linear modules named in ``settings.targets``.

        Raises:
            InputError: if the model has none of them.
        """
        targets = self.adaptable(settings.targets)
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
        )
        self.peft.append(adapted(self.model, config))

    def adaptable(self, targets: Iterable[str]) -> list[str]:
        """Those of the names that linear modules have.

        Raises:
            InputError: if there are none.
        """
        names = {
            name.rsplit(".", 1)[-1] for name, module in self.model.named_modules() if isinstance(module, nn.Linear)
        }
        found = [name for name in targets if name in names]
        if not found:
            raise InputError(
                f"contrast.lora.targets: the model has none of {', '.join(targets)}. "
                f"Its linear modules are {', '.join(sorted(names))}."
            )
        return found

    def not_adapted(self) -> list[str]:
        """Names of the layers' linear modules without adapters."""
        linear = [name for name, module in self.model.base_model.named_modules() if isinstance(module, nn.Linear)]
        return sorted({name.rsplit(".", 1)[-1] for name in linear if "lora_" not in name} - {"base_layer"})

    def merge_lora(self) -> None:
        """Fold the adapters, if there are any, into the weights they adapt; 4-bit weights become bfloat16 first."""
        if self.quantized:
            self._dequantize()
        while self.peft:
            self.model = self.peft.pop().merge_and_unload()

    def _dequantize(self) -> None:
        """Turn 4-bit weights into bfloat16 ones of the same values, under the same adapters."""
        held = [(peft.peft_config["default"], get_peft_model_state_dict(peft)) for peft in self.peft]
        while self.peft:
            self.model = self.peft.pop().unload()
        with quiet():
            self.model.dequantize(torch.bfloat16)
        setattr(self.model, "is_loaded_in_4bit", False)  # noqa: B010 - no attribute of all modules
        for config, adapters in held:
            peft = adapted(self.model, config)
            set_peft_model_state_dict(peft, adapters)
            self.peft.append(peft)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names and values of all weights, as float32, the same however they were stored."""
    digest = hashlib.sha256()
    for name, stored in sorted(model.state_dict().items()):
        tensor = stored.float() if stored.is_floating_point() else stored
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
