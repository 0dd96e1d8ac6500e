"""Training in bfloat16 follows training in float32."""

from pathlib import Path

import pytest
import torch
from torch import nn

from anchorembed.data.pairs import TextPair
from anchorembed.model.embedder import Embedder
from anchorembed.recipe_schema import Reconstruct
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import step
from tiny import save_tiny


@pytest.mark.slow
def test_bfloat16_training_tracks_float32(tmp_path: Path) -> None:
    """200 steps of Stage I in both: the curves fall alike, nearer to each other than two seeds are."""
    folder = save_tiny(tmp_path / "tiny")
    curves = {
        run: curve(folder, "float32" if run != "bfloat16" else "bfloat16", seed=run == "other seed")
        for run in ("float32", "bfloat16", "other seed")
    }
    exact, rounded, other = (curves[run].unfold(0, 20, 20).mean(1) for run in ("float32", "bfloat16", "other seed"))
    assert float(exact[-1]) < 0.8 * float(exact[0])
    assert float((rounded - exact).abs().max()) < max(float((other - exact).abs().max()), 0.02 * float(exact[0]))


def curve(folder: Path, precision: str, seed: int) -> torch.Tensor:
    """Losses of 200 steps on pairs that a tiny model can learn."""
    embedder = Embedder.load(folder, precision="bfloat16" if precision == "bfloat16" else "float32", device="cpu")
    stage = Reconstruction.build(embedder, Reconstruct(sink=False), budget=4096)
    module = stage.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, fused=True)
    generator = torch.Generator().manual_seed(int(seed))
    losses = []
    for number in range(200):
        texts = [f"row {int(torch.randint(50, (), generator=generator))}" for _ in range(8)]
        metrics = step(stage, number, embedder.pairs.tokenize([_pair(text) for text in texts], [""] * len(texts)))
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics["loss"])
    return torch.tensor(losses)


def _pair(text: str) -> TextPair:
    return TextPair(query=text, positive=f"the {text} of the table", negatives=())
