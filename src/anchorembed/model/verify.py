"""Measure a model's scales and compare our packed forward pass with its own, once, when it is loaded.

Axes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorembed.errors import InputError
from anchorembed.model.attention import ATTENTION
from anchorembed.model.backbone import Backbone
from anchorembed.model.packing import PackedBatch, pack

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of our loss against the model's own, in nats a token
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # by which a scaled input may differ
_MEASURING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # by which a measured scale may


def probe_batch(backbone: Backbone) -> PackedBatch:
    """Two random sequences, on the backbone's device."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.head.weight.shape[0]
    sequences = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (13, 8)]
    return pack(sequences).to(backbone.device)


@torch.no_grad()
def measure_scales(backbone: Backbone, name: str) -> None:
    """Set the backbone's input and logit scales to what the model's own forward pass shows them to be.

    Raises:
        InputError: if the model cannot run on packed tokens, or adds more to its input vectors than a scale.
    """
    batch = probe_batch(backbone)
    with _as_input_error(backbone, name):
        backbone.input_scale = _measure_input_scale(backbone, batch)
        products = _products(backbone, batch)
        own = _own_logits(backbone, batch)
        uncapped = own if backbone.softcap is None else backbone.softcap * torch.atanh(own / backbone.softcap)
        backbone.logit_scale = _tidy(float((uncapped * products).sum() / (products * products).sum()), backbone.stored)


@torch.no_grad()
def check_reproduced(backbone: Backbone, name: str) -> None:
    """Compare our loss on packed tokens with that of the model's own forward pass, each sequence by itself.

    Both run with the weights as they are stored, so that 4 bits, or bfloat16, are on both sides.

    Raises:
        InputError: if they differ by more than 0.001 nats a token, or 0.03 where weights and products are bfloat16.
    """
    tolerance = _TOLERANCE[backbone.stored]
    batch = probe_batch(backbone)
    with _as_input_error(backbone, name):
        own = _own_logits(backbone, batch)
        logits = _products(backbone, batch) * backbone.logit_scale
    ours = logits if backbone.softcap is None else backbone.softcap * torch.tanh(logits / backbone.softcap)
    targets = batch.tokens.roll(-1)
    difference = abs(float(F.cross_entropy(ours, targets) - F.cross_entropy(own, targets)))
    if not difference <= tolerance:
        raise InputError(
            f"model.name: {name!r} ({backbone.name}): our loss differs from its own forward's by {difference:.3g} nats "
            f"a token, over {tolerance}. It is not supported; use a causal decoder with rotary positions."
        )


@contextmanager
def _as_input_error(backbone: Backbone, name: str) -> Iterator[None]:
    """Turn whatever a model's code raises into an InputError that names the model."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model.name: {name!r} ({backbone.name}) cannot run packed: {error}") from error


def _products(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """Final states times the output head, without its scale and soft-cap, [T, V] in float32."""
    states_TH = backbone.states(backbone.embed(batch.tokens), batch)
    return F.linear(states_TH.to(backbone.stored), backbone.head.weight, backbone.head.bias).float()


def _own_logits(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """Logits [T, V] of each sequence by the model's own forward pass, with its own attention."""
    sequences = batch.tokens.split(batch.offsets.diff().tolist())
    backbone.model.set_attn_implementation("eager")
    try:
        logits = [backbone.model(input_ids=tokens[None], use_cache=False).logits[0].float() for tokens in sequences]
    finally:
        backbone.model.set_attn_implementation(ATTENTION)
    return torch.cat(logits)


def _measure_input_scale(backbone: Backbone, batch: PackedBatch) -> float:
    """Return what the model multiplies its input vectors by before the first layer (Granite does, Llama does not)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = backbone.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        vectors_TH = backbone.model.get_input_embeddings()(batch.tokens)
        backbone.states(vectors_TH, batch)
    finally:
        hook.remove()
    if not seen:
        raise InputError(
            f"{backbone.name}: its first layers are not its decoder's; of a model that sees, name the text model."
        )
    first_TH, vectors_TH = seen[0][0].float(), vectors_TH.float()
    scale = _tidy(float((first_TH * vectors_TH).sum() / (vectors_TH * vectors_TH).sum()), backbone.stored)
    if not torch.allclose(first_TH, vectors_TH * scale, rtol=_ROUNDING[backbone.stored], atol=1e-6):
        raise InputError(
            f"{backbone.name}: adds to its input vectors (learned positions?); only rotary ones are supported."
        )
    return scale


def _tidy(scale: float, dtype: torch.dtype) -> float:
    """Round a measured scale to the whole number it must be when it is within measuring error of one."""
    return float(round(scale)) if abs(scale - round(scale)) < _MEASURING[dtype] * abs(scale) else scale
