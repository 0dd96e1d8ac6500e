"""Stage I on four pairs and a tiny model."""

from dataclasses import replace

import torch

from anchorembed.data.pairs import TextPair
from anchorembed.model.backbone import Backbone
from anchorembed.model.embedder import Embedder, Metadata
from anchorembed.model.template import Template, bake
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.train.reconstruct import Reconstruction, ReconstructionModule
from tiny import reproduce, tiny_model, tiny_tokenizer

PAIRS = [
    TextPair("sort a list", "the values of a list are sorted in place"),
    TextPair("x", "one"),
    TextPair("open a file and read all its lines", "no"),
    TextPair("delete", "the folder and all files in it are deleted, links are not followed " * 3),
]
TEMPLATE = Template("<s>", "user: ", "", "</s>")


def make(name: str) -> tuple[Embedder, list[TokenPair]]:
    backbone = Backbone(tiny_model(name).eval())
    reproduce(backbone, name)
    embedder = Embedder(backbone, bake(tiny_tokenizer(), TEMPLATE), Metadata(TEMPLATE, Lengths(24, 40)))
    return embedder, embedder.pairs.pairs(PAIRS, ["", "Query: ", "", ""])


def stage(embedder: Embedder, **changes: object) -> Reconstruction:
    settings = Reconstruction(
        ReconstructionModule(embedder), torch.device("cpu"), embedder.pairs.end_id, "both", 0.8, 10_000
    )
    return replace(settings, **changes)  # type: ignore[arg-type]
