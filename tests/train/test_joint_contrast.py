"""Stage II's loss beside Stage I's, on the same anchors: its value and gradient, in micro-batches, and refusals."""

import pytest
import torch

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.errors import InputError
from anchorembed.recipe_file import parse_as
from anchorembed.recipe_schema import Contrast
from anchorembed.train.stage import step
from stages import make, ready, same_in_micro_batches, stage


def gradients(weight: float | None, decode: bool = True) -> tuple[dict[str, float], list[torch.Tensor]]:
    embedder, pairs = make("llama")
    metrics = step(stage(embedder, contrast_weight=weight, decode=decode), 0, pairs)
    return metrics, [parameter.grad for parameter in embedder.backbone.model.parameters() if parameter.grad is not None]


def test_it_is_stage_two_s_loss_and_gradient() -> None:
    """Alone, it is Stage II without adapters; beside the text loss, its share of the gradient is what it adds."""
    embedder, pairs = make("llama")
    stage_two = ready(embedder, Contrast(lora=None, hard_negatives=0, scale=20))
    wanted = step(stage_two, 0, pairs)["loss"]
    wanted_gradients = [
        parameter.grad for parameter in embedder.backbone.model.parameters() if parameter.grad is not None
    ]
    alone, own = gradients(0.5, decode=False)
    assert alone == pytest.approx({"loss": 0.5 * wanted, "loss_contrast": wanted}, abs=1e-5)
    plain, without = gradients(None)
    beside, both = gradients(0.5)
    assert beside == pytest.approx(plain | {"loss": plain["loss"] + 0.5 * wanted, "loss_contrast": wanted}, abs=1e-5)
    for of_stage_two, ours, text, joint in zip(wanted_gradients, own, without, both, strict=True):
        torch.testing.assert_close(ours, 0.5 * of_stage_two, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(joint, text + 0.5 * of_stage_two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"anchor": "centred"}, {"read_weight": 0.7}, {"decode": False}])
@pytest.mark.parametrize("budget", [130, 170])
def test_micro_batches_are_one_step(form: dict[str, object], budget: int) -> None:
    """Queries are compared with documents of other micro-batches, too."""
    same_in_micro_batches(budget if "read_weight" not in form else 2 * budget, 5e-6, contrast_weight=0.5, **form)


@pytest.mark.parametrize("directions", ["q2d", "d2q", "alternate", "d2d", "next_token"])
def test_one_side_s_anchors_are_refused(directions: str) -> None:
    with pytest.raises(InputError, match=f"directions: {directions} has not"):
        parse_as(ControlReconstruct, {"directions": directions, "contrast_weight": 1.0}, "arm")
