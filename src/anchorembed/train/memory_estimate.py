"""Estimate the bytes that a stage takes from the model's configuration, before it is run and without its weights.

Weights, gradients and AdamW's moments are exact sums. Activations are those that transformers' layers of Llama's shape
keep for the backward pass when compiled one by one; a layer that is not compiled keeps up to 1.7 times as much.

Axes: T tokens of a micro-batch, H hidden size, F feed-forward size, V vocabulary, r rank of the adapters.
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from anchorembed.errors import InputError, first_line
from anchorembed.model.load import load_config
from anchorembed.model.sentence_transformers_settings import check_causal
from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.system.device import Weights
from anchorembed.train.stage import StepSize

GB = 1e9
_FLOAT32, _BFLOAT16 = 4, 2  # bytes
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes: 4 bits, a byte for each block of 64, a float32 for 256 blocks
_BYTES_A_LOGIT = 3 * _FLOAT32  # beside the product: logits, their softmax and gradient in float32
_NOT_COMPILED = 1.7  # activations of a layer that is not compiled, relative to a compiled one

ON_CPU = 8192  # tokens of a micro-batch by default
_BUDGETS = [2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536]  # to choose from on a GPU


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        layers: number of layers.
        hidden: H.
        inner: F, the feed-forward size.
        queries: length of a token's queries, over all heads.
        keys: length of its keys, over all heads.
        heads: heads of the queries.
        normed: whether queries and keys are normalised.
        vocabulary: V.
        linear: name, outputs and inputs of each linear module of all layers.
        head: weights of the output head; of one tied to the embedding only those of its bias.
        count: number of all weights.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    normed: bool
    vocabulary: int
    linear: tuple[tuple[str, int, int], ...]
    head: int
    count: int

    @property
    def products(self) -> int:
        """Weights of all layers' linear modules."""
        return sum(out * into for _, out, into in self.linear)


@dataclass(frozen=True, slots=True)
class Use:
    """Settings of a stage that decide its memory, in each process.

    Attributes:
        weights: how the decoder's weights are stored.
        product: bytes of a number in matrix products: 2 for bfloat16, 4 for float32.
        stream: bytes of a number in the states between layers.
        budget: tokens computed at once.
        size: sizes of a step; its ``most`` are the tokens of one process.
        logits: most logits at once; 0 in Stage II.
        compiled: whether layers are compiled.
        recompute: whether activations are recomputed in the backward pass.
        shards: processes that weights, gradients and moments are spread over.
        guide: bytes of the guide's weights, which are in float32 and not spread.
    """

    weights: Weights
    product: int
    stream: int
    budget: int
    size: StepSize
    logits: int
    recompute: bool = False
    compiled: bool = True
    shards: int = 1
    guide: int = 0

    @property
    def tokens(self) -> int:
        """T, the tokens of the largest micro-batch."""
        return min(max(self.budget, self.size.longest), self.size.most)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a stage at its peak; ``copies`` are weights in the products' dtype, ``logits`` those of one chunk."""

    weights: int
    guide: int
    gradients: int
    moments: int
    copies: int
    activations: int
    logits: int
    embeddings: int

    @property
    def fixed(self) -> int:
        """The part that does not depend on the micro-batch."""
        return self.weights + self.guide + self.gradients + self.moments

    @property
    def total(self) -> int:
        """The peak; logits and compared embeddings do not exist at the same time."""
        return self.fixed + self.copies + self.activations + max(self.logits, self.embeddings)

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in self.__slots__}
        return ", ".join(f"{name} {gb(value)}" for name, value in parts.items() if value >= self.total / 1000)


def shape_of_model(name: str) -> Shape:
    """Sizes of a model's decoder, by its configuration.

    Raises:
        InputError: if the model cannot be found, is bidirectional, or has no attention of Llama's kind.
    """
    config = load_config(name)
    check_causal(name, config)
    try:
        return shape_of(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"model {name!r} ({config.model_type}) cannot run: {first_line(error)} Use a causal decoder with rotary "
            "positions."
        ) from error


def shape_of(config: PretrainedConfig) -> Shape:
    """Sizes of a configuration's decoder; it is built on the meta device, without memory for weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    linear = tuple(
        (name.rsplit(".", 1)[-1], module.out_features, module.in_features)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Shape(
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        inner=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        queries=heads * size,
        keys=int(getattr(text, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        normed=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        vocabulary=int(embedding.shape[0]),
        linear=linear,
        head=sum(parameter.numel() for parameter in head.parameters() if parameter is not embedding),
        count=sum(parameter.numel() for parameter in model.parameters()),
    )


def use_of(
    recipe: Recipe,
    settings: Schedule,
    size: StepSize,
    dtype: torch.dtype,
    logits: int,
    processes: int = 1,
    sharded: bool = False,
    compiled: bool = True,
) -> Use:
    """The settings of a recipe's stage that decide its memory; ``logits`` is the most at once.

    ``processes`` share a step's pairs. If ``sharded``, they also share weights, gradients and moments, and layers are
    not compiled.
    """
    return Use(
        weights=recipe.model.weights,
        product=dtype.itemsize,
        stream=_FLOAT32 if recipe.model.weights == recipe.model.residual == "float32" else dtype.itemsize,
        budget=settings.budget(ON_CPU),
        size=replace(size, most=ceil(size.most / processes)),
        logits=logits if size.writes else 0,
        recompute=settings.recompute,
        compiled=compiled and not sharded,
        shards=processes if sharded else 1,
    )


def fitting_budget(shape: Shape, use: Use, available: int) -> int:
    """Tokens to compute at once on a GPU: as many as fit into 90 % of ``available`` bytes, at most 65,536."""
    budgets = [size for size in _BUDGETS if estimate(shape, replace(use, budget=size)).total <= 0.9 * available]
    return max(budgets, default=_BUDGETS[0])


def estimate(shape: Shape, use: Use) -> Estimate:
    """Bytes that a stage takes at its peak, in each process."""
    trained = trained_weights(shape, use)
    adapters = trained if use.size.lora else 0
    return Estimate(
        weights=(stored_bytes(shape, use.weights) + _FLOAT32 * adapters) // use.shards,
        guide=use.guide,
        gradients=_FLOAT32 * trained // use.shards,
        moments=2 * _FLOAT32 * trained // use.shards,
        copies=_copies(shape, use),
        activations=use.tokens * _activations_per_token(shape, use),
        logits=_logits(shape, use),
        embeddings=_embeddings(shape, use),
    )


def trained_weights(shape: Shape, use: Use) -> int:
    """Number of weights that train: those of the adapters if there are any."""
    if lora := use.size.lora:
        return sum(lora.rank * (out + into) for name, out, into in shape.linear if name in lora.targets)
    return shape.count - (0 if use.size.writes else shape.head)


def stored_bytes(shape: Shape, weights: Weights) -> int:
    """Bytes of the decoder's weights in a storage format, without adapters."""
    if weights == "nf4":
        return int(_NF4 * shape.products) + _BFLOAT16 * (shape.count - shape.products)
    return (_FLOAT32 if weights == "float32" else _BFLOAT16) * shape.count


def _copies(shape: Shape, use: Use) -> int:
    """Bytes of weights in the products' dtype: autocast copies all float32 weights; 4-bit ones, one by one."""
    if use.weights == "nf4":
        return use.product * max((out * into for _, out, into in shape.linear), default=0)
    return use.product * shape.products if use.weights == "float32" and use.product < _FLOAT32 else 0


def _activations_per_token(shape: Shape, use: Use) -> int:
    """Bytes that all layers keep for each token; with ``recompute`` their inputs and one layer's activations."""
    ends = 2 * use.stream * shape.hidden + 2 * _FLOAT32 * shape.queries // shape.heads  # final norm; positions' angles
    layer = layer_bytes(shape, use) if use.compiled else int(_NOT_COMPILED * layer_bytes(shape, use))
    if use.recompute:
        return ends + layer + shape.layers * use.stream * shape.hidden
    return ends + layer * shape.layers


def layer_bytes(shape: Shape, use: Use) -> int:
    """Bytes that one layer keeps for each token for its backward pass.

    In the products' dtype: queries, keys, values, attention's output, gate and up, a normalised state, and the inputs
    of the modules that train. In the dtype of the stream: the layer's input. In float32: scales of norms and heads.
    """
    kept = 2 * shape.inner + shape.hidden + 2 * shape.queries + 2 * shape.keys
    scales = 2 + shape.heads
    if shape.normed:
        kept += shape.queries + shape.keys
        scales += (shape.queries + shape.keys) * shape.heads // shape.queries
    inputs, masks = _inputs(shape, use)
    return use.product * (kept + inputs) + use.stream * shape.hidden + _FLOAT32 * scales + masks


def _inputs(shape: Shape, use: Use) -> tuple[int, int]:
    """Numbers kept as inputs of a layer's trained modules, and bytes of dropout masks."""
    lora = use.size.lora
    if lora is None:
        return shape.inner + 2 * shape.hidden, 0
    adapted = [
        (name, into) for name, _, into in shape.linear[: len(shape.linear) // shape.layers] if name in lora.targets
    ]
    dropped = sum(into for _, into in adapted)
    low = lora.rank * len(adapted)
    if lora.dropout:  # so each adapter keeps its own input
        return dropped + low, dropped
    shared = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention")
    shared |= dict.fromkeys(("gate_proj", "up_proj"), "feed-forward")
    inputs = {shared.get(name, name): into for name, into in adapted}
    return sum(inputs.values()) + low, 0


def _logits(shape: Shape, use: Use) -> int:
    """Bytes of a chunk of logits, of the head's weight in the products' dtype, and of its new gradient if it trains."""
    if not use.logits:
        return 0
    at_once = min(use.logits, use.tokens * shape.vocabulary)
    copy = use.product if use.weights == "float32" and use.product < _FLOAT32 else 0
    gradient = 0 if use.size.lora else _FLOAT32
    return at_once * (_BYTES_A_LOGIT + use.product) + (gradient + copy) * shape.vocabulary * shape.hidden


def _embeddings(shape: Shape, use: Use) -> int:
    """Bytes of a step's embeddings and their gradients, and of similarities with mask, softmax and gradients."""
    size = use.size
    vectors = 2 * _FLOAT32 * (size.queries + size.documents) * shape.hidden
    return vectors + (4 * _FLOAT32 + 1) * size.queries * size.documents


def gb(size: float) -> str:
    """Bytes in GB with two significant digits."""
    value = size / GB
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
