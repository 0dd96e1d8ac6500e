"""What a model is measured and checked by when it is loaded changes neither the model nor its backbone."""

from typing import Any

import pytest
import torch

from anchorembed.model import attention, choose_attention
from anchorembed.model.attention import ATTENTION
from anchorembed.model.backbone import Backbone, weights_sha256
from anchorembed.model.check_packed_loss import check_reproduced, measure_scales, own_logits
from stand_ins import varlen_on_the_cpu
from tiny import reproduced, tiny_model


def state(backbone: Backbone) -> dict[str, Any]:
    modules = list(backbone.modules())
    return {
        **{name: value for name, value in vars(backbone).items() if not name.startswith("_")},
        "weights": weights_sha256(backbone.model),
        "attention": backbone.model.config._attn_implementation,
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules),
        "training": {module.training for module in modules},
        "gradients": {weight.grad for weight in backbone.parameters()},
    }


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_measuring_and_checking_change_nothing(name: str) -> None:
    model = tiny_model(name).eval()
    model.set_attn_implementation("eager")
    own_TV = own_logits(model, name)
    assert model.config._attn_implementation == "eager"
    backbone = Backbone(model)
    before = state(backbone)
    assert before["attention"] == ATTENTION
    scales = measure_scales(backbone, own_TV, name)
    assert state(backbone) == before
    backbone.input_scale, backbone.logit_scale = scales
    assert measure_scales(backbone, own_TV, name) == pytest.approx(scales), "whatever scales it has"
    before = state(backbone)
    check_reproduced(backbone, own_TV, name)
    assert state(backbone) == before


@pytest.mark.parametrize("is_wrong", [False, True])
def test_trying_the_varlen_kernel_changes_nothing(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen_on_the_cpu()
    backbone = reproduced(tiny_model("mistral").eval(), "mistral")
    right = attention.varlen_attn
    if is_wrong:
        monkeypatch.setattr(attention, "varlen_attn", lambda *args, **options: -right(*args, **options))
    before = state(backbone)
    reason = choose_attention._failure(backbone, torch.float32)
    assert state(backbone) == before
    assert reason.startswith("the varlen kernel's states differ by") == is_wrong
