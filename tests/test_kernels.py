"""Fused = plain, values and gradients, as it stands and compiled; copies of weights are never stale."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anchorembed import kernels


def random(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).requires_grad_(grad)


@pytest.fixture(params=["plain", "compiled"])
def size(request: pytest.FixtureRequest) -> int:
    """Rows of 64: few, so that functions run as they stand, or enough to be compiled."""
    if request.param == "compiled" and kernels.compiler() is None:
        pytest.skip("no C++ compiler")
    return 16 if request.param == "plain" else kernels._WORTH_COMPILING // 64


def same_gradients(ours: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    weights = random(*plain.shape, grad=False)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    of_plain = torch.autograd.grad((plain * weights).sum(), inputs, retain_graph=True)
    of_ours = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)
    for one, other in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_norm(size: int) -> None:
    h, delta, weight = random(size, 64), random(size, 64), random(64)
    plain = F.rms_norm(h + delta, (64,), weight + 1, 1e-6)
    same_gradients(kernels.add_norm(h, delta, weight, 1.0, 1e-6, torch.float32)[1], plain, [h, delta, weight])
    plain = F.rms_norm(h, (64,), weight, 1e-6)
    same_gradients(kernels.norm(h, weight, 0.0, 1e-6, torch.float32)[0], plain, [h, weight])


def test_what_is_recomputed_is_the_same(size: int) -> None:
    gate, up, weight = random(size, 64), random(size, 64), random(8, 64)
    gated, again = kernels.swiglu(gate, up)
    with again:
        (ours,) = kernels.products(gated, [weight])
    same_gradients(ours, (F.silu(gate) * up) @ weight.T, [gate, up, weight])
    h, scale = random(size, 64), random(64)
    normed, again = kernels.norm(h, scale, 0.0, 1e-6, torch.float32)
    with again:
        (ours,) = kernels.products(normed, [weight])
    same_gradients(ours, F.rms_norm(h, (64,), scale, 1e-6) @ weight.T, [h, scale, weight])


def test_what_is_recomputed_is_not_kept() -> None:
    """Autograd holds on to its hooks, so they must not refer to what they are to replace."""
    h, weight = random(8, 64), random(64)
    normed, again = kernels.norm(h, weight, 0.0, 1e-6, torch.float32)
    with again:
        result = normed * random(8, 64)
    kept = weakref.ref(normed)
    del normed, again
    assert kept() is None
    result.sum().backward()


@pytest.mark.parametrize("window", [None, 5])
def test_short_attention(size: int, window: int | None) -> None:
    sequences = 2 if size == 16 else 40
    q, k, v = random(sequences, 6, 32, 8), random(sequences, 2, 32, 8), random(sequences, 2, 32, 8, seed=1)
    allowed = torch.ones(32, 32, dtype=torch.bool).tril()
    if window:
        allowed = allowed.triu(1 - window)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True)
    same_gradients(kernels.short_attention(q, k, v, 0.3, window), plain, [q, k, v])


def test_attention_in_blocks_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 heads' scores or fewer: 24 key heads make 4 blocks of 6."""
    q, k, v = random(12, 4, 10, 8), random(12, 2, 10, 8), random(12, 2, 10, 8, seed=1)
    whole = kernels.short_attention(q, k, v, 0.3, None)
    expected = torch.autograd.grad(whole.square().sum(), [q, k, v])
    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", 7 * 20 * 10)
    assert [part.stop - part.start for part in kernels._blocks(24, 200)] == [6, 6, 6, 6]
    blocks = kernels.short_attention(q, k, v, 0.3, None)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.square().sum(), [q, k, v]), expected)
    with torch.inference_mode():
        torch.testing.assert_close(kernels.short_attention(q, k, v, 0.3, None), whole)


def test_dropout_drops_its_share_and_the_same_in_backward(size: int) -> None:
    x, down = random(size, 64), torch.eye(64, requires_grad=True)
    torch.manual_seed(0)
    dropped = kernels.low_rank(x, down, 0.25)
    kept = dropped != 0
    rows = kept.float().mean(0)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=4 * (0.19 / kept.numel()) ** 0.5)
    assert float(rows.std()) == pytest.approx((0.19 / size) ** 0.5, rel=0.35)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.75)
    (slope,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(slope != 0, kept)
    assert not torch.equal(kernels.low_rank(x, down, 0.25) != 0, kept)


def test_a_copy_of_a_weight_is_never_stale() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    for factor in (1.0, 2.0):
        with kernels.weights_unchanged():
            first = kernels.low(weight, torch.bfloat16)
            with kernels.weights_unchanged():
                assert kernels.low(weight, torch.bfloat16) is first
        assert torch.equal(first, torch.full((4, 4), factor, dtype=torch.bfloat16))
        weight.data.mul_(2.0)  # as peft merges and fused optimizers update: no version tells


def test_a_trained_weight_is_cast_once_whatever_the_passes() -> None:
    """In backward autograd may hand back another object for the weight: that must not make another copy."""
    h, scale, weight = random(8, 64), random(64), random(16, 64)
    with kernels.weights_unchanged():
        for _ in range(3):
            normed, again = kernels.norm(h, scale, 0.0, 1e-6, torch.bfloat16)
            with again:
                (result,) = kernels.products(normed, [weight])
            result.float().sum().backward()
        copies = kernels._copies.get()
        assert copies is not None
        assert len(copies) == 1
    assert weight.grad is not None


def test_without_a_compiler_it_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    kernels.compiler.cache_clear()
    gate = random(kernels._WORTH_COMPILING // 64, 64)
    try:
        with pytest.warns(UserWarning, match=r"No C\+\+ compiler") as said:
            results = [kernels.swiglu(gate, gate)[0] for _ in range(2)]
    finally:
        kernels.compiler.cache_clear()
    assert len(said) == 1
    torch.testing.assert_close(results[1], F.silu(gate) * gate)
