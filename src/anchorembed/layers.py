"""Run decoder layers of Llama's shape with fewer passes over memory than their own code needs.

A layer qualifies by what it does, not by its name: its parts are where Llama's are, and on random input it gives what
its own ``forward`` gives. Any other layer (and so any other architecture) keeps its own code.

Axes: T packed tokens, H hidden size, A heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorembed.attention import SHORT, AttentionOptions, options_of
from anchorembed.kernels import (
    add_norm,
    into_buckets,
    low_rank,
    norm,
    out_of_buckets,
    products,
    short_attention,
    swiglu,
)
from anchorembed.packing import Bucket

Module = Any  # torch types a module's attributes as Tensor | Module, which they are not
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class _Scale:
    """An RMSNorm as it is measured: its weight is stored less ``offset`` (Gemma stores it less 1)."""

    module: Module
    offset: float
    epsilon: float


class FusedLayer:
    """The forward pass of one decoder layer, by the layer's own weights and adapters."""

    def __init__(self, layer: Module, options: AttentionOptions) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.options = layer, options
        self.original = layer.forward
        self.before, self.between = _scale(layer.input_layernorm), _scale(layer.post_attention_layernorm)
        self.of_queries = _scale(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.of_keys = _scale(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.head_size = int(attention.head_dim)
        self.is_silu = _is_silu(mlp.act_fn)

    def __call__(
        self,
        hidden_states: Tensor,
        *args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        packing: Sequence[Bucket] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Do what the layer's own ``forward`` does on packed sequences [1, T, H]; anything else is left to it."""
        if packing is None or position_embeddings is None:
            own: Tensor = self.original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
            return own
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        with torch.autocast(device, enabled=False):
            return self._run(hidden_states[0], position_embeddings, packing, dtype)[None]

    def _run(
        self, h_TH: Tensor, angles: tuple[Tensor, Tensor], packing: Sequence[Bucket], dtype: torch.dtype
    ) -> Tensor:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        normed, again = norm(h_TH, self.before.module.weight, self.before.offset, self.before.epsilon, dtype)
        with again:
            q, k, v = project(normed, (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed_TH = self._attend(q, k, v, angles, packing)
        (delta_TH,) = project(mixed_TH, (attention.o_proj,))
        scale = self.between
        h_TH, normed, again = add_norm(h_TH, delta_TH, scale.module.weight, scale.offset, scale.epsilon, dtype)
        with again:
            gate, up = project(normed, (mlp.gate_proj, mlp.up_proj))
        if self.is_silu:
            gated, again = swiglu(gate, up)
            with again:
                (delta_TH,) = project(gated, (mlp.down_proj,))
        else:
            (delta_TH,) = project(mlp.act_fn(gate) * up, (mlp.down_proj,))
        return h_TH + delta_TH

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], packing: Sequence[Bucket]
    ) -> Tensor:
        q, k, v = (side.unflatten(-1, (-1, self.head_size)) for side in (q, k, v))
        if self.of_queries is not None and self.of_keys is not None:
            q, k = (_normed_heads(side, scale) for side, scale in ((q, self.of_queries), (k, self.of_keys)))
        laid = into_buckets(q, k, v, (angles[0][0], angles[1][0]), packing)
        outputs = [self._causal(*bucket) for bucket in laid]
        return out_of_buckets(packing, outputs).flatten(1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, window, scale = q.shape[2], self.options.window, self.options.scale
        scale = scale if scale is not None else self.head_size**-0.5
        window = window if window is not None and window < length else None
        if q.device.type == "cpu" and length <= SHORT:
            return short_attention(q, k, v, scale, window)
        mask = None
        if window is not None:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def project(x_TH: Tensor, modules: Sequence[Module]) -> list[Tensor]:
    """Outputs of linear modules on the same input, their LoRA adapters included; dropout is drawn once for all."""
    bases: list[Module] = [getattr(module, "base_layer", module) for module in modules]
    outputs = list(products(x_TH, [base.weight for base in bases]))
    outputs = [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(outputs, bases, strict=True)]
    adapted = [number for number, module in enumerate(modules) if getattr(module, "lora_A", None)]
    if not adapted:
        return outputs
    downs = [modules[number].lora_A["default"].weight for number in adapted]
    chance = modules[adapted[0]].lora_dropout["default"]
    rate = float(getattr(chance, "p", 0.0)) if chance.training else 0.0
    reduced = low_rank(x_TH, torch.cat(downs), rate).split([len(down) for down in downs], -1)
    for number, low_TR in zip(adapted, reduced, strict=True):
        up = modules[number].lora_B["default"].weight.to(x_TH.dtype)
        outputs[number] = torch.addmm(outputs[number], low_TR, up.T, alpha=modules[number].scaling["default"])
    return outputs


@torch.no_grad()
def fuse_layers(layers: nn.ModuleList, angles: tuple[Tensor, Tensor], packing: Sequence[Bucket], hidden: int) -> None:
    """Give each layer that qualifies a fused ``forward``.

    Args:
        layers: after a run on packed sequences, so that what each asks of attention is known.
        angles: cosines and sines [1, T, D] for a probe.
        packing: of that probe.
        hidden: H.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, angles[0].shape[1], hidden, generator=generator).to(angles[0].device)
    for layer in layers:
        own = layer(probe, position_embeddings=angles, packing=packing)
        fused = _try(layer)
        if fused is None:
            continue
        try:
            with_ours = fused(probe, position_embeddings=angles, packing=packing)
        except RuntimeError:  # of other shapes, such as rotary positions of a part of each head
            continue
        if torch.allclose(own, with_ours, rtol=_TOLERANCE, atol=_TOLERANCE):
            layer.forward = fused.__call__


def _try(layer: Module) -> FusedLayer | None:
    """The layer's fused forward, or None where it lacks what Llama's has or has more."""
    parts = {name for name, _ in layer.named_children()}
    attention = getattr(layer, "self_attn", None)
    if parts != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} or attention is None:
        return None
    options = options_of(attention)
    if options is None or options.softcap is not None or getattr(attention, "attention_dropout", False):
        return None
    inside = {name for name, _ in attention.named_children()} | {name for name, _ in layer.mlp.named_children()}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if not linear <= inside <= linear | {"act_fn", "q_norm", "k_norm"}:
        return None
    try:
        return FusedLayer(layer, options)
    except AttributeError:
        return None


def _scale(module: Module) -> _Scale:
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    ones = torch.ones_like(module.weight)
    ratio = (module(ones) / ones - module.weight).mean()
    return _Scale(module, float(round(float(ratio))), float(epsilon))


def _normed_heads(x_TAD: Tensor, scale: _Scale) -> Tensor:
    normed, _ = norm(x_TAD, scale.module.weight, scale.offset, scale.epsilon, x_TAD.dtype)
    return normed


def _is_silu(function: Module) -> bool:
    probe = torch.linspace(-5, 5, 11)
    return torch.allclose(function(probe), F.silu(probe), atol=1e-6)
