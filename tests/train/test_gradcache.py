"""Cached = uncached, values and gradients, with dropout on."""

import pytest
import torch
from torch import nn

from anchorembed.train import gradcache
from anchorembed.train.contrastive_losses import info_nce
from anchorembed.train.gradcache import GradCache


class Net(nn.Module):
    """A layer with dropout whose random numbers depend on the chunks, as any model's do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(6, 5), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.dropout(x))


def loss(embeddings: torch.Tensor) -> torch.Tensor:
    half = len(embeddings) // 2
    return info_nce(embeddings[:half], embeddings[half:], 3.0)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 12])
def test_cached_equals_uncached(size: int) -> None:
    data = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    chunks = data.split(size)
    cached, plain = Net(), Net()
    torch.manual_seed(5)
    cache = GradCache(cached, chunks, torch.device("cpu"))
    value = loss(cache.vectors_NH)
    cache.backward(value)
    after = torch.rand(1)
    torch.manual_seed(5)
    expected = loss(torch.cat([plain(chunk) for chunk in chunks]))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(after, torch.rand(1)), "the random stream goes on as if nothing had been replayed"
    for ours, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_without_replay_dropout_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcache, "_set_random_state", lambda *_: None)
    with pytest.raises(AssertionError):
        test_cached_equals_uncached(3)
