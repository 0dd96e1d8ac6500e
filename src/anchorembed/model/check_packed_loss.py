"""Measure a model's scales and compare our packed forward pass with the model's own, once, when it is loaded.

The model's own logits are computed first, with its own attention, which `Backbone` then replaces. Nothing here changes
the model or its backbone.

Axes: T tokens of all probe sequences, V vocabulary, H hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchorembed.errors import InputError
from anchorembed.model.backbone import Backbone
from anchorembed.model.packing import PackedBatch, pack

_PROBE_LENGTHS = (13, 8)  # tokens
_LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # between our loss and the model's, in nats a token
_LARGEST_LEAK = 1e-3  # relative, of a text's states, from the texts packed before it
_INPUT_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # relative, of a scaled input vector
_SCALE_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # relative, of a measured scale
_OVERFLOW = "its numbers overflow, as some weights are far too large. Use an earlier checkpoint, or download it again."


def probe_batch(backbone: Backbone) -> PackedBatch:
    """Two sequences of random tokens, packed, on the backbone's device."""
    return pack(_probe_sequences(backbone.head.weight.shape[0])).to(backbone.device)


def _probe_sequences(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _PROBE_LENGTHS]


@torch.no_grad()
def own_logits(model: PreTrainedModel, name: str) -> Tensor:
    """Logits [T, V], float32, of each probe sequence by itself, by the model's own forward pass.

    It is called before a `Backbone` replaces the model's attention.

    Raises:
        InputError: if the model's code fails, or a logit is not finite.
    """
    weight_VH = model.get_output_embeddings().weight
    sequences = [torch.tensor([tokens], device=weight_VH.device) for tokens in _probe_sequences(len(weight_VH))]
    with _faults_named(name, str(model.config.model_type)):
        logits = [model(input_ids=tokens_1L, use_cache=False).logits[0].float() for tokens_1L in sequences]
    own_TV = torch.cat(logits)
    if not own_TV.isfinite().all():
        raise InputError(f"model {name!r}: {_OVERFLOW}")
    return own_TV


@torch.no_grad()
def measure_scales(backbone: Backbone, own_TV: Tensor, name: str) -> tuple[float, float]:
    """Measure the factors by which a model multiplies its input vectors and its logits; 1 for most models.

    Raises:
        InputError: if the model cannot run on packed tokens, or does more to its input vectors than scale them.
    """
    batch = probe_batch(backbone)
    with _faults_named(name, backbone.name):
        input_scale = _input_scale(backbone, batch)
        states_TH = backbone.states(backbone.embed(batch.tokens), batch)
        products_TV = replace(backbone.head, scale=1.0, softcap=None).logits(states_TH).float()
    uncapped_TV = own_TV if backbone.softcap is None else backbone.softcap * torch.atanh(own_TV / backbone.softcap)
    logit_scale = float((uncapped_TV * products_TV).sum() / (products_TV * products_TV).sum())
    return input_scale, _rounded_if_whole(logit_scale, backbone)


@torch.no_grad()
def check_reproduced(backbone: Backbone, own_TV: Tensor, name: str) -> None:
    """Compare our loss on packed tokens, with the measured scales, with the loss of the model's own logits.

    Both use the weights as they are stored: rounding to 4 bits or bfloat16 is on both sides.

    Raises:
        InputError: if they differ by more than 0.001 nats a token, or 0.03 where weights and products are bfloat16; in
            float32 also if the states of a text depend on the texts packed with it.
    """
    batch = probe_batch(backbone)
    with _faults_named(name, backbone.name):
        ours_TV = backbone.head.logits(backbone.states(backbone.embed(batch.tokens), batch)).float()
    targets_T = batch.tokens.roll(-1)
    difference = abs(float(F.cross_entropy(ours_TV, targets_T) - F.cross_entropy(own_TV, targets_T)))
    limit = _LARGEST_DIFFERENCE[backbone.weights_dtype]
    if not difference <= limit:
        raise InputError(
            f"model {name!r} ({backbone.name}): our loss differs from its own forward's by {difference:.3g} nats "
            f"a token, over {limit}. It is not supported; use a causal decoder with rotary positions."
        )
    leak = _leak(backbone) if backbone.weights_dtype == torch.float32 else 0.0  # less than bfloat16 rounds
    if leak > _LARGEST_LEAK:
        raise InputError(
            f"model {name!r} ({backbone.name}): a text's states change by {leak:.3g}, over {_LARGEST_LEAK}, with the "
            "text before it. It is not supported; use a causal decoder with rotary positions."
        )


def _leak(backbone: Backbone) -> float:
    """How much the last probe sequence's states differ, relatively, when it is packed behind others and when alone."""
    packed, alone = probe_batch(backbone), pack(_probe_sequences(len(backbone.head.weight))[-1:]).to(backbone.device)
    packed_TH, alone_TH = (backbone.states(backbone.embed(batch.tokens), batch).float() for batch in (packed, alone))
    return float((packed_TH[-len(alone_TH) :] - alone_TH).norm() / alone_TH.norm())


@contextmanager
def _faults_named(name: str, architecture: str) -> Iterator[None]:
    """Turn whatever a model's code raises into an InputError that names the model and its architecture."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model {name!r} ({architecture}) cannot run: {error} Use a causal decoder with rotary positions."
        ) from error


def _input_scale(backbone: Backbone, batch: PackedBatch) -> float:
    """The factor by which the model multiplies its input vectors before its first layer, such as 3 in a Granite."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    with backbone.layers[0].register_forward_pre_hook(keep, with_kwargs=True):
        vectors_TH = backbone.model.get_input_embeddings()(batch.tokens)
        backbone.states(vectors_TH * backbone.input_scale, batch)  # `states` divides by that scale
    if not inputs:
        raise InputError(
            f"{backbone.name}: its first layers are not the decoder's. Of a vision model, name the text model."
        )
    inputs_TH, vectors_TH = inputs[0][0].float(), vectors_TH.float()
    scale = float((inputs_TH * vectors_TH).sum() / (vectors_TH * vectors_TH).sum())
    scale = _rounded_if_whole(scale, backbone)
    if not torch.allclose(inputs_TH, vectors_TH * scale, rtol=_INPUT_ROUNDING[backbone.weights_dtype], atol=1e-6):
        raise InputError(
            f"{backbone.name}: adds to its input vectors (learned positions?); only rotary ones are supported."
        )
    return scale


def _rounded_if_whole(scale: float, backbone: Backbone) -> float:
    """A measured scale, rounded to a whole number if it is within measuring error of one."""
    if not math.isfinite(scale):
        raise InputError(f"{backbone.name}: {_OVERFLOW}")
    is_whole = abs(scale - round(scale)) < _SCALE_ROUNDING[backbone.weights_dtype] * abs(scale)
    return float(round(scale)) if is_whole else scale
