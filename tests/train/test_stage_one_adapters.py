"""Stage I by adapters: their loss and gradient by hand, in micro-batches, what trains, and what it costs."""

import pytest
import torch
from torch import nn

from anchorembed.model.adapters import merge_lora
from anchorembed.recipe_schema import Lora
from anchorembed.train.stage import step
from stages import make, stage

ADAPTERS = Lora(rank=3, alpha=6, dropout=0.0)


def test_their_gradient_is_that_of_the_weights_they_adapt() -> None:
    """W + s B A with B = 0 is W: the loss is that of all weights, and B's gradient is s dL/dW A^T."""
    embedder, pairs = make("llama")
    wanted = step(stage(embedder), 0, pairs)
    of_weights = {name: weight.grad for name, weight in embedder.backbone.model.named_parameters()}
    adapted, _ = make("llama")
    assert step(stage(adapted, lora=ADAPTERS), 0, pairs) == pytest.approx(wanted, abs=1e-6)
    linear = {name: module for name, module in adapted.backbone.model.named_modules() if hasattr(module, "lora_B")}
    assert len(linear) == 2 * 7, "seven modules in each of two layers"
    for name, module in linear.items():
        down, up = (getattr(module, side)["default"].weight for side in ("lora_A", "lora_B"))
        torch.testing.assert_close(up.grad, 2 * of_weights[f"{name}.weight"] @ down.T, rtol=1e-4, atol=1e-6)
        assert not down.grad.any()
    trained = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * len(linear)


def gradients(budget: int, **form: object) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Losses and gradients of adapters that are no longer zero, and the same each time."""
    embedder, pairs = make("llama")
    torch.manual_seed(0)
    run = stage(embedder, budget, lora=ADAPTERS, **form)
    trained = [weight for weight in embedder.parameters() if weight.requires_grad]
    for weight in trained:
        nn.init.normal_(weight, std=0.05)
    assert len(run.make_batch(0, pairs).micro_batches) == (1 if budget > 1000 else 3)
    return step(run, 0, pairs), [weight.grad for weight in trained]


@pytest.mark.parametrize("form", [{}, {"anchor": "centred", "contrast_weight": 0.5}, {"bag_weight": 0.5}])
def test_micro_batches_are_one_step(form: dict[str, object]) -> None:
    one, several = gradients(10_000, **form), gradients(130, **form)
    assert one[0] == pytest.approx(several[0], abs=1e-5)
    for whole, parts in zip(one[1], several[1], strict=True):
        assert whole.any()
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_merged_they_are_the_model_that_was_trained() -> None:
    embedder, pairs = make("llama")
    run = stage(embedder, lora=ADAPTERS)
    optimizer = torch.optim.AdamW([weight for weight in embedder.parameters() if weight.requires_grad], lr=1e-2)
    before = embedder.encode(["sort a list"])
    for number in range(2):
        step(run, number, pairs)
        optimizer.step()
        optimizer.zero_grad()
    trained = embedder.encode(["sort a list"])
    merge_lora(embedder.backbone)
    assert abs(trained - before).max() > 1e-3
    assert not any("lora_" in name for name, _ in embedder.named_parameters())
    assert abs(embedder.encode(["sort a list"]) - trained).max() < 1e-6


def test_flops_are_without_the_gradients_of_frozen_weights() -> None:
    embedder, pairs = make("llama")
    all_weights = stage(embedder).flops(0, pairs)
    assert stage(embedder, lora=ADAPTERS).flops(0, pairs) == pytest.approx(all_weights * 4 / 6)
