"""Our sides of the comparisons: AnchorEmbed's own parts, put together as ``anchorembed.train`` does."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from anchorembed.data.pairs import TextPair
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_schema import Contrast, Reconstruct
from anchorembed.train.contrast import Contrastive
from anchorembed.train.flops import weight_count
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import Stage, step


class Training:
    """A stage and its optimizer; called with a batch of pairs, it does one training step as ``loop.fit`` does."""

    def __init__(self, stage: Stage, learning_rate: float) -> None:
        self.embedder, self.stage = stage.embedder, stage
        self.parameters = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        stage.module.train()

    def __call__(self, batch: Sequence[TextPair]) -> dict[str, Any]:
        """Tokenise, accumulate gradients, clip, update."""
        pairs = self.embedder.pairs.tokenize(batch, [""] * len(batch))
        metrics = step(self.stage, 0, pairs)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return {**metrics, "flops": self.stage.flops(0, pairs)}


def stage1(args: argparse.Namespace) -> Training:
    """Stage I, both directions, all weights."""
    stage = Reconstruction.build(_embedder(args), Reconstruct(sink=False), args.tokens_per_micro_batch)
    return Training(stage, learning_rate=4e-5)


def stage2(args: argparse.Namespace) -> Training:
    """Stage II with LoRA on queries and positives; a batch beyond the token budget goes through GradCache."""
    stage = Contrastive.build(_embedder(args), Contrast(hard_negatives=0), args.tokens_per_micro_batch)
    return Training(stage, learning_rate=2e-4)


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
