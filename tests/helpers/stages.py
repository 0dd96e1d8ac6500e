"""Both stages on a tiny model, and four pairs for them."""

import pytest
import torch

from anchorembed.compare.controls import ControlReconstruct, ControlReconstruction
from anchorembed.data.pairs import TextPair
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import Metadata
from anchorembed.model.template import Template, bake
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.recipe_schema import Contrast, Reconstruct, Schedule
from anchorembed.train.contrast import Contrastive
from anchorembed.train.memory_estimate import ON_CPU
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import Stage, step
from tiny import reproduced, tiny_model, tiny_tokenizer

PAIRS = [
    TextPair("sort a list", "the values of a list are sorted in place"),
    TextPair("x", "one"),
    TextPair("open a file and read all its lines", "no"),
    TextPair("delete", "the folder and all files in it are deleted, links are not followed " * 3),
]
KINDS: dict[type[Schedule], type[Stage]] = {
    Reconstruct: Reconstruction,
    ControlReconstruct: ControlReconstruction,
    Contrast: Contrastive,
}
TEMPLATE = Template("<s>", "user: ", "", "</s>")


def make(name: str) -> tuple[Embedder, list[TokenPair]]:
    backbone = reproduced(tiny_model(name).eval(), name)
    embedder = Embedder(backbone, bake(tiny_tokenizer(), TEMPLATE), Metadata(TEMPLATE, Lengths(24, 40)))
    return embedder, embedder.pairs.tokenize(PAIRS, ["", "Query: ", "", ""])


def stage(embedder: Embedder, budget: int = 10_000, **settings: object) -> ControlReconstruction:
    """Stage I in the paper's form, but for ``settings``."""
    wanted = ControlReconstruct(**({"sink": False} | settings))  # type: ignore[arg-type]
    return ControlReconstruction.build(embedder, wanted, budget)


def same_in_micro_batches(budget: int, atol: float = 1e-6, **settings: object) -> None:
    """A step of the four pairs in several micro-batches has the losses and gradients of one."""
    whole, pairs = make("llama")
    parts, _ = make("llama")
    one, several = step(stage(whole, **settings), 0, pairs), stage(parts, budget, **settings)
    assert len(several.make_batch(0, pairs).micro_batches) > 1
    assert one == pytest.approx(step(several, 0, pairs), abs=1e-5)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=atol)


def ready(embedder: Embedder, settings: Schedule, budget: int | None = None) -> Stage:
    """The stage that has such settings, ready to train."""
    return KINDS[type(settings)].build(embedder, settings, budget or settings.budget(ON_CPU))
