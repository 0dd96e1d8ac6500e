"""Packed + fused = the layer's own code, values and gradients; and a change in one layer is left to its own code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from anchorembed import layers
from anchorembed.backbone import Backbone, LoraSettings, reproduce
from anchorembed.embedder import Embedder
from anchorembed.kernels import gradients_in_place
from anchorembed.packing import PackedBatch, pack
from anchorembed.reconstruction import decoding
from anchorembed.records import TextPair
from anchorembed.runtime import autocast
from anchorembed.steps import Reconstruction, ReconstructionModule
from conftest import ARCHITECTURES, save_tiny, tiny_model

LORA = LoraSettings(4, 8, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
FUSED = ["llama", "llama-untied", "qwen3", "mistral", "gemma", "granite"]


def batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(400, (length,), generator=generator).tolist() for length in (3, 17, 9, 1, 16)])


def pair_of(name: str) -> tuple[Backbone, Backbone]:
    """A backbone with fused layers and the same one without."""
    plain = Backbone(tiny_model(name).eval())
    fused = Backbone(tiny_model(name).eval())
    reproduce(fused, name)
    plain.input_scale, plain.logit_scale = fused.input_scale, fused.logit_scale
    return fused, plain


def decoder(backbone: Backbone) -> nn.ModuleList:
    return next(module for module in backbone.model.base_model.modules() if isinstance(module, nn.ModuleList))


def run(backbone: Backbone, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of all trained weights, after one backward through a random readout."""
    packed = batch()
    readout = torch.randn(len(packed.tokens), 32, generator=torch.Generator().manual_seed(2))
    with autocast(torch.device("cpu"), dtype):
        states = backbone.states(backbone.embed(packed.tokens), packed)
    (states.float() * readout).sum().backward()
    return states.detach().float()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_layers_are_fused(name: str) -> None:
    fused, _ = pair_of(name)
    ours = [isinstance(getattr(layer.forward, "__self__", None), layers.FusedLayer) for layer in decoder(fused)]
    assert ours == [name in FUSED] * 2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_the_layers_own_code(name: str, lora: bool) -> None:
    fused, plain = pair_of(name)
    if lora:
        for backbone in (fused, plain):
            torch.manual_seed(3)
            backbone.add_lora(LORA)
            for key, weight in backbone.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(weight, std=0.1)
    torch.testing.assert_close(run(fused, torch.float32), run(plain, torch.float32), rtol=1e-4, atol=1e-5)
    for (key, one), (_, other) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", FUSED)
def test_bfloat16_is_as_near_to_float32_as_the_layers_own_code(name: str) -> None:
    fused, plain = pair_of(name)
    exact = run(plain, torch.float32)
    own, ours = run(plain, torch.bfloat16), run(fused, torch.bfloat16)
    assert float((ours - exact).norm()) < 1.5 * float((own - exact).norm())


def test_a_layer_that_does_something_else_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., torch.Tensor] = layers.swiglu
    monkeypatch.setattr(layers, "swiglu", lambda gate, up: (right(gate, 1.01 * up)[0], right(gate, up)[1]))
    fused, _ = pair_of("llama")
    assert not any("forward" in vars(layer) for layer in decoder(fused))


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma"])
def test_gradients_added_in_place_are_those_that_autograd_sums(name: str) -> None:
    gradients = []
    for in_place in (False, True):
        model = Backbone(tiny_model(name))
        reproduce(model, name)
        embedder = nn.Module()
        embedder.backbone, embedder.dtype = model, torch.float32
        embedder.forward = lambda packed, model=model: model.states(model.embed(packed.tokens), packed)[packed.anchors]
        module = ReconstructionModule(embedder)  # type: ignore[arg-type]
        targets = decoding([[5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15]], 1)
        for _ in range(2):
            weights = torch.full((len(targets.targets),), 0.1)
            if in_place:
                with gradients_in_place():
                    module(batch(), targets, weights, bag_weight=0.5)[0].backward()
            else:
                module(batch(), targets, weights, bag_weight=0.5)[0].backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    for key, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], plain, rtol=1e-4, atol=1e-6, msg=key)


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
    module = ReconstructionModule(embedder)
    stage = Reconstruction(module, torch.device("cpu"), embedder.pairs.end_id, "both", 0.8, 4096)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, fused=True)
    generator = torch.Generator().manual_seed(int(seed))
    losses = []
    for number in range(200):
        texts = [f"row {int(torch.randint(50, (), generator=generator))}" for _ in range(8)]
        metrics = stage.step(number, embedder.pairs.pairs([_pair(text) for text in texts], [""] * len(texts)))
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics["loss"])
    return torch.tensor(losses)


def _pair(text: str) -> TextPair:
    return TextPair(query=text, positive=f"the {text} of the table", negatives=())
