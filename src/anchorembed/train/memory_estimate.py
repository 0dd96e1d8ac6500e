"""How many bytes a stage takes, before it is run: counted from the model's configuration, without its weights.

Weights, gradients and AdamW's moments are exact sums. Activations are what transformers' layers of Llama's shape keep
for the backward pass when compiled one by one; a layer that is not compiled keeps up to 1.7 times as much.

Axes: T tokens of a micro-batch, H hidden size, F feed-forward size, V vocabulary, r rank of the adapters.
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from anchorembed.config import Recipe, Schedule
from anchorembed.system.device import Weights
from anchorembed.train.stage import StepSize

GB = 1e9
_FLOAT32, _BFLOAT16 = 4, 2  # bytes
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes: 4 bits, a byte a block of 64, and a float32 each 256 of those
_BYTES_A_LOGIT = 3 * _FLOAT32  # beside the product: logits, their softmax and slope in float32
_NOT_COMPILED = 1.7  # times as much is kept by a layer that is not compiled

ON_CPU = 8192  # tokens of a micro-batch where the recipe leaves it open
_BUDGETS = [2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536]  # to choose from on a GPU


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        layers: how many there are.
        hidden: H.
        inner: F, the feed-forward size.
        queries: length of a token's queries, over all heads.
        keys: length of its keys, over all heads.
        heads: heads of the queries.
        normed: whether queries and keys have norms of their own.
        vocabulary: V.
        linear: name, outputs and inputs of each linear module of all layers.
        head: weights of an output head of its own; 0 where it is the embedding.
        count: weights in all.
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
    """What a stage does with a decoder.

    Attributes:
        weights: how they are stored.
        product: bytes of a number in matrix products: 2 for bfloat16, 4 for float32.
        stream: bytes of a number in the states between layers.
        rank: r, of the adapters; 0 where the weights themselves train.
        adapted: names of the linear modules with adapters.
        dropout: whether there is dropout before the adapters.
        trains_head: whether an output head of its own trains.
        budget: tokens computed at once.
        longest: tokens that cannot be split up: those of a pair in Stage I, of a text in Stage II.
        most: tokens of a process's whole step.
        logits: logits that exist at once, at most; 0 where there are none.
        queries: queries whose similarities exist at once; 0 in Stage I.
        documents: documents they are compared with.
        compiled: whether layers are.
        recompute: whether a layer's activations are computed again in the backward pass.
        shards: processes that weights, gradients and moments are spread over.
    """

    weights: Weights
    product: int
    stream: int
    rank: int
    adapted: tuple[str, ...]
    dropout: bool
    trains_head: bool
    budget: int
    longest: int
    most: int
    logits: int
    queries: int
    documents: int
    recompute: bool = False
    compiled: bool = True
    shards: int = 1

    @property
    def tokens(self) -> int:
        """T, the tokens of the largest micro-batch."""
        return min(max(self.budget, self.longest), self.most)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a stage's peak: ``copies`` are weights in the products' dtype, ``logits`` the head's chunk of them."""

    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    logits: int
    embeddings: int

    @property
    def fixed(self) -> int:
        """What is there whatever the micro-batch."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """The peak: logits are gone when embeddings are compared."""
        return self.fixed + self.copies + self.activations + max(self.logits, self.embeddings)

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in self.__slots__}
        return ", ".join(f"{name} {gb(value)}" for name, value in parts.items() if value)


def shape_of(config: PretrainedConfig) -> Shape:
    """The sizes of the decoder that a configuration describes, built without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    linear = _linear(model.base_model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
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
        head=0 if head is embedding else head.numel(),
        count=sum(parameter.numel() for parameter in model.parameters()),
    )


def _linear(decoder: nn.Module) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (name.rsplit(".", 1)[-1], module.out_features, module.in_features)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
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
    """What a stage of a recipe does, in each process.

    Args:
        recipe: the whole recipe.
        settings: those of the stage.
        size: what one of its steps holds.
        dtype: of matrix products.
        logits: logits that exist at once, at most.
        processes: how many share a step's pairs.
        sharded: whether weights, gradients and moments are spread over them.
        compiled: whether layers are, where weights are not spread.
    """
    lora = size.lora
    return Use(
        weights=recipe.model.weights,
        product=dtype.itemsize,
        stream=_FLOAT32 if recipe.model.weights == recipe.model.residual == "float32" else _BFLOAT16,
        rank=lora.rank if lora else 0,
        adapted=tuple(lora.targets) if lora else (),
        dropout=bool(lora and lora.dropout),
        trains_head=size.writes,
        budget=settings.budget(ON_CPU),
        longest=size.longest,
        most=ceil(size.most / processes),
        logits=logits if size.writes else 0,
        queries=size.queries,
        documents=size.documents,
        recompute=settings.recompute,
        compiled=compiled and not sharded,
        shards=processes if sharded else 1,
    )


def fitting_budget(shape: Shape, use: Use, have: int) -> int:
    """Tokens to compute at once on a GPU: as many as fit into nine tenths of what it has, 65,536 at most."""
    budgets = [size for size in _BUDGETS if estimate(shape, replace(use, budget=size)).total <= 0.9 * have]
    return max(budgets, default=_BUDGETS[0])


def estimate(shape: Shape, use: Use) -> Estimate:
    """Bytes that a stage takes at its peak, in each process."""
    trained = trained_weights(shape, use)
    adapters = trained if use.rank else 0
    return Estimate(
        weights=(stored_bytes(shape, use.weights) + _FLOAT32 * adapters) // use.shards,
        gradients=_FLOAT32 * trained // use.shards,
        moments=2 * _FLOAT32 * trained // use.shards,
        copies=_copies(shape, use),
        activations=use.tokens * _activations_a_token(shape, use),
        logits=_logits(shape, use),
        embeddings=_compared(shape, use),
    )


def trained_weights(shape: Shape, use: Use) -> int:
    """How many weights train: the adapters' if there are any."""
    if use.rank:
        return sum(use.rank * (out + into) for name, out, into in shape.linear if name in use.adapted)
    return shape.count - (0 if use.trains_head else shape.head)


def stored_bytes(shape: Shape, weights: Weights) -> int:
    """Bytes of the decoder's own weights, stored so."""
    if weights == "nf4":
        return int(_NF4 * shape.products) + _BFLOAT16 * (shape.count - shape.products)
    return (_FLOAT32 if weights == "float32" else _BFLOAT16) * shape.count


def _copies(shape: Shape, use: Use) -> int:
    """Weights in the products' dtype, which autocast makes of all float32 ones, and 4-bit ones become one by one."""
    if use.weights == "nf4":
        return use.product * max((out * into for _, out, into in shape.linear), default=0)
    return use.product * shape.products if use.weights == "float32" and use.product < _FLOAT32 else 0


def _activations_a_token(shape: Shape, use: Use) -> int:
    """Bytes that all layers keep of a token; with ``recompute`` each layer's input and one layer's activations."""
    ends = 2 * use.stream * shape.hidden + 2 * _FLOAT32 * shape.queries // shape.heads  # final norm; positions' angles
    layer = layer_bytes(shape, use) if use.compiled else int(_NOT_COMPILED * layer_bytes(shape, use))
    if use.recompute:
        return ends + layer + shape.layers * use.stream * shape.hidden
    return ends + layer * shape.layers


def layer_bytes(shape: Shape, use: Use) -> int:
    """Bytes that one layer keeps of a token for its backward pass.

    In the products' dtype: queries, keys, values, what attention gives, gate and up, a normed state, and the inputs of
    the modules that train. In the dtype of the weights: the layer's input. In float32: scales of norms and heads.
    """
    kept = 2 * shape.inner + shape.hidden + 2 * shape.queries + 2 * shape.keys
    scales = 2 + shape.heads
    if shape.normed:
        kept += shape.queries + shape.keys
        scales += (shape.queries + shape.keys) * shape.heads // shape.queries
    inputs, masks = _inputs(shape, use)
    return use.product * (kept + inputs) + use.stream * shape.hidden + _FLOAT32 * scales + masks


def _inputs(shape: Shape, use: Use) -> tuple[int, int]:
    """Numbers kept of a layer's inputs to what trains, and bytes of dropout's masks."""
    if not use.rank:
        return shape.inner + 2 * shape.hidden, 0
    adapted = [
        (name, into) for name, _, into in shape.linear[: len(shape.linear) // shape.layers] if name in use.adapted
    ]
    dropped = sum(into for _, into in adapted)
    low = use.rank * len(adapted)
    if use.dropout:  # each adapter drops other numbers of its input
        return dropped + low, dropped
    groups = {_group(name): into for name, into in adapted}
    return sum(groups.values()) + low, 0


def _group(name: str) -> str:
    """Modules of one name have one input."""
    if name in ("q_proj", "k_proj", "v_proj"):
        return "attention"
    return "feed-forward" if name in ("gate_proj", "up_proj") else name


def _logits(shape: Shape, use: Use) -> int:
    """The head's chunk of logits; its weight in the products' dtype, and that weight's gradient before it is added."""
    if not use.logits:
        return 0
    at_once = min(use.logits, use.tokens * shape.vocabulary)
    copy = use.product if use.weights == "float32" and use.product < _FLOAT32 else 0
    return at_once * (_BYTES_A_LOGIT + use.product) + (_FLOAT32 + copy) * shape.vocabulary * shape.hidden


def _compared(shape: Shape, use: Use) -> int:
    """A step's embeddings and their gradients, similarities with mask, softmax and gradients."""
    vectors = 2 * _FLOAT32 * (use.queries + use.documents) * shape.hidden
    return vectors + (4 * _FLOAT32 + 1) * use.queries * use.documents


def gb(size: float) -> str:
    """Bytes in GB with two digits that count."""
    value = size / GB
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
