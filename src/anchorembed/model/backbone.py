"""Run a decoder on packed sequences: ``f`` (vectors to states), ``E`` (embedding), ``W`` (head).

Any causal decoder of transformers with rotary positions works, because none of it is rewritten: only its attention is
replaced, through transformers' registry, by one that keeps packed sequences apart. `check_packed_loss` measures on
loading whether that gives the model's own outputs, scales and soft-caps included.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anchorembed.model.attention import ATTENTION
from anchorembed.model.packing import PackedBatch

# Keys of a config that change no vector: names, versions, how weights are stored (their values are hashed), special
# tokens (those of the tokenizer are used), and settings of training or generation.
_NOT_FORWARD = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
}


@dataclass(frozen=True, slots=True)
class Head:
    """The output head ``W``: ``logits = cap(scale * (states @ weight.T + bias))``, cap(x) = c * tanh(x / c)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, states_NH: Tensor) -> Tensor:
        """Logits of a few states, [N, V], in the states' dtype."""
        bias_V = None if self.bias is None else self.bias.to(states_NH.dtype)
        logits_NV = self.scale * F.linear(states_NH, self.weight.to(states_NH.dtype), bias_V)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


class Backbone(nn.Module):
    """A causal language model as three functions on packed tokens: ``embed`` (E), ``states`` (f), ``head`` (W).

    Attributes:
        model: transformers' own model; its attention is replaced.
        name: its architecture, as transformers calls it.
        input_scale: factor of the model's input vectors.
        logit_scale: factor of its logits.
        softcap: soft-cap of its logits, or None.
        varlen: whether attention is by the varlen kernel rather than in buckets.
        residual_dtype: of the residual stream between layers.
        peft: LoRA adapters that are not merged, in a list: as an attribute their weights would be registered twice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.name = str(model.config.model_type)
        self.input_scale = 1.0
        self.logit_scale = 1.0
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.varlen = False
        self.residual_dtype = self.weights_dtype
        self.peft: list[PeftModel] = []
        model.set_attn_implementation(ATTENTION)

    # --- The three functions ---

    def embed(self, tokens_T: Tensor) -> Tensor:
        """E: token ids [T] to input vectors [T, H], in the scale in which an anchor enters."""
        module = self.model.get_input_embeddings()
        # nn.Embedding itself would give a padding token's row no gradient.
        vectors_TH: Tensor = F.embedding(tokens_T, module.weight) if type(module) is nn.Embedding else module(tokens_T)
        return vectors_TH if self.input_scale == 1.0 else vectors_TH * self.input_scale

    def states(self, vectors_TH: Tensor, batch: PackedBatch, varlen: bool | None = None) -> Tensor:
        """f: input vectors [T, H], in the scale of `embed`, to final states [T, H] after the last norm.

        Attention is by the varlen kernel or in buckets, by default as the attribute ``varlen`` says.
        """
        vectors_TH = vectors_TH if self.input_scale == 1.0 else vectors_TH / self.input_scale
        by_kernel = self.varlen if varlen is None else varlen
        layout = {"ends": batch.ends, "longest": batch.longest} if by_kernel else {"offsets": batch.offsets}
        inputs_1TH = torch.stack([vectors_TH.to(self.residual_dtype)])  # given a view, layers compile again
        if self.peft and torch.is_grad_enabled() and not inputs_1TH.requires_grad:
            inputs_1TH.requires_grad_()  # as inputs of later layers do, so that the first layer shares their graph
        output = self.model.base_model(
            inputs_embeds=inputs_1TH, position_ids=batch.positions[None], use_cache=False, **layout
        )
        states_TH: Tensor = output.last_hidden_state[0]
        return states_TH

    @property
    def head(self) -> Head:
        """W: the output head with the model's own scale and soft-cap."""
        linear = self.model.get_output_embeddings()
        return Head(linear.weight, getattr(linear, "bias", None), self.logit_scale, self.softcap)

    # --- Properties of the model ---

    @property
    def head_is_untied(self) -> bool:
        """Whether the output head has weights other than the input vectors."""
        return self.model.get_output_embeddings().weight is not self.model.get_input_embeddings().weight

    @property
    def hidden_size(self) -> int:
        """H, the length of an embedding."""
        return int(self.head.weight.shape[1])

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights that are not 4-bit: float32 or bfloat16."""
        return cast("Tensor", self.model.get_output_embeddings().weight).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return next(module for module in self.model.base_model.modules() if isinstance(module, nn.ModuleList))

    def mean_token_norm(self) -> Tensor:
        """Mean Euclidean length of the input vectors of all tokens, a scalar without gradient."""
        weight_VH = cast("Tensor", self.model.get_input_embeddings().weight).detach()
        lengths_V: Tensor = torch.linalg.vector_norm(weight_VH, dim=-1, dtype=torch.float32)  # without a float32 copy
        return lengths_V.mean() * self.input_scale

    # --- How it trains ---

    def recompute_layers(self) -> None:
        """Gradient checkpointing: keep only each layer's input, and recompute the rest in the backward pass."""
        # transformers deprecates the name, and older versions lack the new one
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def freeze_head(self) -> None:
        """Freeze the output head's bias, and its weight unless that is the embedding: no vector depends on them."""
        for parameter in self.model.get_output_embeddings().parameters():
            if parameter is not self.model.get_input_embeddings().weight:
                parameter.requires_grad_(False)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the names and values of all weights as float32, the same whatever dtype they are stored in."""
    digest = hashlib.sha256()
    for name, stored in sorted(model.state_dict().items()):
        tensor = stored.float() if stored.is_floating_point() else stored
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def forward_settings(config: PretrainedConfig) -> str:
    """The keys of a config that affect the forward pass, as JSON; unknown keys are included."""

    def kept(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {str(key): kept(part) for key, part in value.items() if key not in _NOT_FORWARD}

    return json.dumps(kept(config.to_dict()), sort_keys=True, default=str)
