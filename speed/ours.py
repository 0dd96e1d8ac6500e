"""AnchorEmbed's sides of the benchmarks: its stages and ``encode``, used as ``anchorembed.train`` uses them."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from anchorembed.data.pairs import TextPair
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_schema import Contrast, Reconstruct
from anchorembed.train.contrast import Contrastive
from anchorembed.train.flops import weight_count
from anchorembed.train.loop import whole_step
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import Stage


class Training:
    """A stage and its optimizer; called with a batch of pairs, it makes one training step as ``loop.fit`` does."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.optimizer = stage, make_optimizer(stage.module, stage.settings)
        stage.module.train()

    def __call__(self, batch: Sequence[TextPair]) -> dict[str, Any]:
        """Tokenise, accumulate gradients, clip, update."""
        pairs = self.stage.embedder.pairs.tokenize(batch, [""] * len(batch))
        metrics = whole_step(self.stage, self.optimizer, 0, pairs)
        return {**metrics, "flops": self.stage.flops(0, pairs)}


def stage1(args: argparse.Namespace) -> Training:
    """Stage I, both directions, all weights."""
    return Training(Reconstruction.build(_embedder(args), Reconstruct(sink=False), args.tokens_per_micro_batch))


def stage2(args: argparse.Namespace) -> Training:
    """Stage II with LoRA on queries and positives; a batch beyond the token budget goes through GradCache."""
    return Training(Contrastive.build(_embedder(args), Contrast(hard_negatives=0), args.tokens_per_micro_batch))


def encode(args: argparse.Namespace) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Texts to unit vectors."""
    embedder = _embedder(args)

    def step(texts: Sequence[str]) -> dict[str, Any]:
        vectors = embedder.encode(texts)
        tokens = sum(map(len, embedder.pairs.templated(list(texts), args.cut)))
        return {"vectors": vectors, "flops": 2.0 * weight_count(embedder.backbone) * tokens}

    return step


def _embedder(args: argparse.Namespace) -> Embedder:
    return Embedder.load(args.model, precision=args.precision, device="cpu", lengths=Lengths(args.cut, args.cut))
