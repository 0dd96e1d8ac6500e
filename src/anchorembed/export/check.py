"""Compare the vectors of a reloaded export with ours, for short, long, empty and unusual texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats, Side, unit_rows

Dtype = Literal["float32", "bfloat16"]
Encode = Callable[[list[str], Side], Floats]  # vectors of texts, float32 [N, H]
SIDES: tuple[Side, Side] = ("document", "query")
TEXTS = (
    "cat",
    ".",
    "",
    "How do I read a file line by line?",
    "Steps:\n\n1. Open  12 files.",
    "Die Würde des Menschen ist unantastbar.",
    "向量检索将文本映射到同一空间。 البحث الدلالي 🙂",
    "A sentence that says one thing after another. " * 400,
)
WITH_SPECIAL_TOKENS = "Special tokens are text here: </s> <|im_end|> <|endoftext|> <eos>"


@dataclass(frozen=True, slots=True)
class Form:
    """A form of export: how to write and reload it, and how its vectors are checked.

    Attributes:
        engine: the software that reads it.
        write: writes an embedder into a folder, with weights of a dtype; it may change the embedder.
        read: opens a written folder in the engine.
        limits: lower limit of the smallest cosine, by dtype of the weights.
        texts: texts whose vectors are compared.
        cuts: whether the engine cuts texts at the length limit; if not, only texts within the limit are compared.
    """

    engine: str
    write: Callable[[Embedder, Path, Dtype], None]
    read: Callable[[Path], Encode]
    limits: Mapping[Dtype, float]
    texts: tuple[str, ...] = (*TEXTS, WITH_SPECIAL_TOKENS)
    cuts: bool = True


def own_vectors(embedder: Embedder, texts: Sequence[str]) -> dict[Side, Floats]:
    """Our unit vectors of texts as queries and as documents, each [N, H]."""
    return {side: embedder.encode(texts, side=side, normalize=True) for side in SIDES}


def smallest_cosine(own: Mapping[Side, Floats], encode: Encode, texts: Sequence[str]) -> float:
    """Smallest cosine between our vector and the engine's, over all texts and both sides; 0 if a vector has NaN."""
    return float(min((own[side] * unit_rows(encode(list(texts), side))).sum(axis=1).min() for side in SIDES))
