"""Read a vector: the likeliest words of its bag, and the text that the decoder writes from it.

Both are as in Stage I (`reconstruct`): the bag is the output head's distribution for the anchor; the decoder starts
from the anchor, with or without a sink before it. The decoder reads a vector if a text is likelier from its own vector
than from those of other texts.

Axes: N vectors, P target tokens, V vocabulary, H hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import Metadata
from anchorembed.model.vectors import Floats, Side
from anchorembed.recipe_schema import Reconstruct
from anchorembed.system.device import autocast
from anchorembed.train.anchors import centred
from anchorembed.train.decoder_input import decoding
from anchorembed.train.reconstruction_loss import decoder_states, head_loss

NEUTRAL = (
    "The bus to the station leaves at nine o'clock.",
    "Water boils at a lower temperature in the mountains.",
    "The committee will publish its report next week.",
    "Press the button twice to restart the machine.",
    "She planted tomatoes and beans behind the house.",
    "The museum is closed on Mondays and holidays.",
    "Interest is paid at the end of each year.",
    "The two teams played a game without a goal.",
    "A warm wind came from the south in the evening.",
    "Each member has one vote in the assembly.",
    "The bridge was built of stone two centuries ago.",
    "Add the flour slowly and stir until it is smooth.",
    "Whales breathe air and feed their young with milk.",
    "The letter arrived three days after it was sent.",
    "Prices of copper and tin fell last spring.",
    "He plays the violin in a small orchestra.",
    "The patient should rest and drink enough water.",
    "Light takes eight minutes from the sun to the earth.",
    "Our shop sells shoes, bags and umbrellas.",
)
_WORDS = 10  # of a bag
_MOST_WRITTEN = 32  # tokens
_CANDIDATES = 200  # likeliest tokens, from which the words are taken


@dataclass(frozen=True, slots=True)
class VectorReading:
    """The likeliest words of a vector's bag with their probabilities, and the text that the decoder writes from it."""

    words: list[tuple[str, float]]
    writes: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A vector compared with that of another text; the last three are None if only a vector is given.

    Attributes:
        own: what is read from the vector.
        against: what is read from the other text's vector.
        other: the other text.
        ratio: the text's log likelihood from its vector minus that from the other's, in nats per token.
        tokens: number of the text's tokens, EOS included.
        below: how many of the vectors of `NEUTRAL` make the text less likely than its own.
    """

    own: VectorReading
    against: VectorReading
    other: str
    ratio: float | None = None
    tokens: int | None = None
    below: int | None = None

    @property
    def is_read(self) -> bool:
        """Whether the text is likelier from its own vector than from every other: by chance one text in 20 is."""
        return self.ratio is not None and self.ratio > 0 and self.below == len(NEUTRAL)

    @property
    def verdict(self) -> str:
        """A sentence on whether the decoder reads the vector."""
        if self.ratio is None:
            return "Give the vector's text, too, to see how much of it the decoder reads."
        word = "less likely" if self.ratio < 0 else "likelier"
        numbers = f"by {abs(self.ratio):.3f} nats a token over {self.tokens} tokens"
        ranks = f"than from {self.below} of {len(NEUTRAL)} neutral texts' vectors"
        likelier = f"its text is {word} than from the other's {numbers}, and likelier {ranks}"
        if not self.is_read:
            return f"The decoder reads nothing above noise: {likelier}."
        return f"The decoder reads the vector: {likelier}."


@torch.no_grad()
def read(
    embedder: Embedder,
    text: str | None,
    *,
    other: str = NEUTRAL[0],
    side: Side = "document",
    vector_H: Floats | None = None,
) -> Reading:
    """Read the vector of ``text``, or a given vector, and compare it with that of the text ``other``.

    A given vector of length 1 is taken for normalised, and scaled to the mean length of the model's vectors. If Stage I
    centred anchors, the vectors of the text, the other text and `NEUTRAL` are centred together.

    Args:
        embedder: any model; one without Stage I in its history is read with Stage I's default settings.
        text: text whose likelihood is measured; None if only a vector is given.
        other: a text to compare with.
        side: query or document, for prompt and length.
        vector_H: vector to read; by default that of ``text``.

    Raises:
        InputError: if there is neither a text with tokens nor a vector, or the vector does not fit the model.
    """
    limit = embedder.metadata.lengths.query if side == "query" else embedder.metadata.lengths.document
    texts = [other] if text is None else [text, other]
    tokens = embedder.pairs.plain(texts, limit)
    if (text is None and vector_H is None) or not all(tokens):
        raise InputError("read: a text is missing, or has no token. Give some words.")
    sink, is_centred = stage_one_form(embedder.metadata)
    embedded = [*(texts if vector_H is None else [other]), *NEUTRAL]  # the last show the noise
    # One text per call, so that the rounding of a vector does not depend on the other texts.
    alone = [embedder.encode([text], side, normalize=False) for text in embedded]
    anchors_NH = torch.tensor(np.concatenate(alone), device=embedder.device)
    if vector_H is not None:
        anchors_NH = torch.cat([_with_length(vector_H, anchors_NH), anchors_NH])
    if is_centred:
        sides_N = torch.zeros(len(anchors_NH), dtype=torch.long, device=embedder.device)
        anchors_NH = centred(anchors_NH, sides_N, embedder.backbone.mean_token_norm())
    own, against = (
        VectorReading(words, str(embedder.tokenizer.decode(ids, skip_special_tokens=True)).strip())
        for words, ids in zip(_bag(embedder, anchors_NH[:2]), _written(embedder, anchors_NH[:2], sink), strict=True)
    )
    if text is None:
        return Reading(own, against, other)
    ids = tokens[0]
    losses_N = _losses(embedder, ids, anchors_NH, sink)
    below = int((losses_N[2:] > losses_N[0]).sum())
    return Reading(own, against, other, float(losses_N[1] - losses_N[0]), len(ids) + 1, below)


def stage_one_form(metadata: Metadata) -> tuple[bool, bool]:
    """Whether the model's last Stage I had a sink, and whether it centred anchors; without Stage I, the defaults."""
    default = Reconstruct()
    plan = {"reconstruct.sink": default.sink, "reconstruct.anchor": default.anchor}
    for stage in metadata.stages:
        stage_plan = stage.get("plan")
        if isinstance(stage_plan, dict) and "reconstruct.steps" in stage_plan:
            plan |= stage_plan
    return bool(plan["reconstruct.sink"]), plan["reconstruct.anchor"] == "centred"


def _with_length(vector_H: Floats, anchors_NH: Tensor) -> Tensor:
    """A vector as an anchor [1, H]; one of length 1 gets the mean length of ``anchors_NH``."""
    if vector_H.shape != (anchors_NH.shape[1],):
        raise InputError(
            f"vector: it has {len(vector_H)} components, and the model's have {anchors_NH.shape[1]}. Give the model "
            "that made it, and vectors with all components."
        )
    vector_1H = torch.tensor(vector_H, device=anchors_NH.device)[None]
    is_unit = math.isclose(float(vector_1H.norm()), 1.0, abs_tol=1e-2)
    return vector_1H * anchors_NH.norm(dim=-1).mean() if is_unit else vector_1H


def _bag(embedder: Embedder, anchors_NH: Tensor) -> list[list[tuple[str, float]]]:
    """The likeliest words, or parts of words, by the output head alone, with their probabilities, for each anchor."""
    # One product per anchor: rows of one product may be rounded differently, so that equal anchors would differ.
    shares_NV = torch.cat([embedder.backbone.head.logits(anchor_1H) for anchor_1H in anchors_NH.split(1)]).softmax(-1)
    likely = shares_NV.topk(min(_CANDIDATES, shares_NV.shape[1]))
    bags = []
    for shares, ids in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        words = [str(embedder.tokenizer.decode([token], skip_special_tokens=True)).strip() for token in ids]
        bag = [(word, share) for word, share in zip(words, shares, strict=True) if any(map(str.isalnum, word))]
        bags.append(bag[:_WORDS])
    return bags


def _written(embedder: Embedder, anchors_NH: Tensor, sink: bool) -> list[list[int]]:
    """The tokens that the decoder writes from each anchor, greedily, up to EOS or `_MOST_WRITTEN` tokens."""
    backbone, end = embedder.backbone, embedder.pairs.end_id
    written: list[list[int]] = [[] for _ in anchors_NH]
    with autocast(backbone.device, embedder.dtype):  # once, as it keeps the weights that it has cast until it ends
        while len(written[0]) < _MOST_WRITTEN and not all(end in ids for ids in written):
            layout = decoding(written, end, sink).to(backbone.device)
            states_NH = decoder_states(backbone, layout, anchors_NH)[layout.batch.anchors]
            with autocast(backbone.device, torch.float32):
                likeliest = backbone.head.logits(states_NH.float()).argmax(-1).tolist()
            for ids, token in zip(written, likeliest, strict=True):
                ids.append(token)
    return [ids[: ids.index(end)] if end in ids else ids for ids in written]


def _losses(embedder: Embedder, ids: Sequence[int], anchors_NH: Tensor, sink: bool) -> Tensor:
    """Mean loss of a text's tokens and EOS, in nats, when written from each anchor, [N]."""
    backbone = embedder.backbone
    layout = decoding([ids] * len(anchors_NH), embedder.pairs.end_id, sink).to(backbone.device)
    with autocast(backbone.device, embedder.dtype):
        states_PH = decoder_states(backbone, layout, anchors_NH)[layout.predicting]
        _, losses_P = head_loss(backbone.head, states_PH, layout.targets, torch.ones_like(states_PH[:, 0]))
    return losses_P.view(len(anchors_NH), -1).mean(1)
