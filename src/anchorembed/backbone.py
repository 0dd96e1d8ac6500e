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
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorembed.attention import ATTENTION, LARGEST_HEAD
from anchorembed.errors import InputError, first_line
from anchorembed.models import load_model, quiet
from anchorembed.packing import PackedBatch, pack
from anchorembed.runtime import Weights, autocast

_log = logging.getLogger(__name__)
_GRAPHS = 64  # that one kind of layer may have: models, adapters, modes and devices of one process
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of our loss against the model's own, in nats a token
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # by which a scaled input may differ
_MEASURING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # by which a measured scale may
_BY_KERNEL = 0.03  # by which the varlen kernel's states may differ from bucketed attention's in bfloat16, relative


@dataclass(frozen=True, slots=True)
class Head:
    """The output head ``W``: ``logits = cap(scale * (states @ weight.T + bias))``, cap(x) = c * tanh(x / c)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters (Hu et al., 2022) on the named linear modules."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


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
        self.peft.append(_adapted(self.model, config))

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
            peft = _adapted(self.model, config)
            set_peft_model_state_dict(peft, adapters)
            self.peft.append(peft)


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


def _adapted(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():  # peft asks transformers in a way that transformers deprecates
        warnings.simplefilter("ignore", FutureWarning)
        adapted: PeftModel = get_peft_model(model, config)
    for module in adapted.modules():
        dropouts = getattr(module, "lora_dropout", {})
        for name, dropout in dropouts.items():
            if isinstance(dropout, nn.Dropout):  # else there is none
                dropouts[name] = AdapterDropout(dropout.p)
    return adapted


def load_backbone(
    name: str, device: torch.device, weights: Weights = "float32"
) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """Load a decoder and its tokenizer, measure its scales, and check that we reproduce its forward pass.

    Args:
        name: ``smollm2-135m``, a hub id, a local folder, or a ``.gguf`` file.
        device: where to put the weights.
        weights: how they are stored.

    Raises:
        InputError: if the model cannot be had, or is not a causal decoder that we reproduce.
    """
    model, tokenizer = load_model(name, weights, device)
    backbone = Backbone(model)
    if weights != "nf4":  # those are quantised where they are to stay
        backbone.to(device)
    reproduce(backbone, name)
    return backbone, tokenizer


@torch.no_grad()
def use_varlen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Let attention run by the varlen kernel, if it can and gives what bucketed attention gives.

    It needs a GPU of compute capability 8.0, bfloat16, heads of at most 256, and neither soft-caps nor
    dropout; a model that asks for more stays with bucketed attention, which is said once.
    """
    if backbone.device.type != "cuda" or dtype == torch.float32:
        return
    if reason := _not_by_varlen(backbone):
        _log.warning("%s: attention by buckets, slower: %s.", backbone.name, reason)
        return
    batch = _probe(backbone)
    with autocast(backbone.device, dtype):
        bucketed = backbone.states(backbone.embed(batch.tokens), batch).float()
        backbone.varlen = True
        try:
            difference = float(
                (backbone.states(backbone.embed(batch.tokens), batch) - bucketed).norm() / bucketed.norm()
            )
            reason = "" if difference <= _BY_KERNEL else f"the varlen kernel's states differ by {difference:.3f}"
        except (RuntimeError, InputError) as error:
            reason = f"the varlen kernel fails: {first_line(error)}"
    if reason:
        backbone.varlen = False
        _log.warning("%s: attention by buckets, slower: %s.", backbone.name, reason)


def _not_by_varlen(backbone: Backbone) -> str:
    """Why a model on a GPU cannot use the varlen kernel; empty if it can."""
    config = backbone.model.config
    if torch.cuda.get_device_capability(backbone.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft-cap"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads of {head} are above {LARGEST_HEAD}" if head > LARGEST_HEAD else ""


def compile_layers(backbone: Backbone, dtype: torch.dtype, backend: str = "inductor") -> bool:
    """Compile the decoder's layers one by one; layers of a kind share their graphs, whatever the lengths.

    A small forward and backward pass shows that it works. If it does not, the layers run as they are, which is said.

    Returns:
        Whether the layers are compiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.specialize_float = True  # scales and dropout are constants; as symbols each graph is traced twice
    for layer in backbone.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    batch = _probe(backbone)
    try:
        with autocast(backbone.device, dtype):
            states = backbone.states(backbone.embed(batch.tokens), batch)
        trained = [weight for weight in backbone.parameters() if weight.requires_grad]
        if trained:
            torch.autograd.grad(states.float().sum(), trained, allow_unused=True)
    except Exception as error:  # the compiler raises many kinds; each means that it does not work here
        for layer in backbone.layers:
            layer._compiled_call_impl = None
        _log.warning("%s: layers are not compiled, slower: %s", backbone.name, first_line(error))
        return False
    return True


def _probe(backbone: Backbone) -> PackedBatch:
    """Two random sequences, on the backbone's device."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.head.weight.shape[0]
    sequences = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (13, 8)]
    return pack(sequences).to(backbone.device)


@torch.no_grad()
def reproduce(backbone: Backbone, name: str) -> None:
    """Measure the model's input and logit scales, then compare our loss on packed tokens with its own.

    Both run with the weights as they are stored, so that 4 bits, or bfloat16, are on both sides.

    Raises:
        InputError: if they differ by more than 0.001 nats a token, or 0.03 where weights and products are bfloat16.
    """
    tolerance = _TOLERANCE[backbone.stored]
    batch = _probe(backbone)
    try:
        own = torch.cat([_own_logits(backbone, tokens) for tokens in batch.tokens.split(batch.offsets.diff().tolist())])
        backbone.input_scale = _measure_input_scale(backbone, batch)
        states_TH = backbone.states(backbone.embed(batch.tokens), batch)
        plain = F.linear(states_TH.to(backbone.stored), backbone.head.weight, backbone.head.bias).float()
        uncapped = own if backbone.softcap is None else backbone.softcap * torch.atanh(own / backbone.softcap)
        backbone.logit_scale = _tidy(float((uncapped * plain).sum() / (plain * plain).sum()), backbone.stored)
    except InputError:
        raise
    except Exception as error:  # any model's code runs here
        raise InputError(f"model.name: {name!r} ({backbone.name}) cannot run packed: {error}") from error
    logits = plain * backbone.logit_scale
    ours = logits if backbone.softcap is None else backbone.softcap * torch.tanh(logits / backbone.softcap)
    targets = batch.tokens.roll(-1)
    difference = abs(float(F.cross_entropy(ours, targets) - F.cross_entropy(own, targets)))
    if not difference <= tolerance:
        raise InputError(
            f"model.name: {name!r} ({backbone.name}): our loss differs from its own forward's by {difference:.3g} nats "
            f"a token, over {tolerance}. It is not supported; use a causal decoder with rotary positions."
        )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names and values of all weights, as float32, the same however they were stored."""
    digest = hashlib.sha256()
    for name, stored in sorted(model.state_dict().items()):
        tensor = stored.float() if stored.is_floating_point() else stored
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _own_logits(backbone: Backbone, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] by the model's own forward, with its own attention."""
    backbone.model.set_attn_implementation("eager")
    try:
        logits: Tensor = backbone.model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
    finally:
        backbone.model.set_attn_implementation(ATTENTION)
    return logits


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
