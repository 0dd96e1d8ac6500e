"""Packed = padded for every kind of decoder, and what is not reproduced is refused by name."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from anchorembed.errors import InputError
from anchorembed.model import attention
from anchorembed.model.adapters import AdapterDropout, add_lora, merge_lora, not_adapted
from anchorembed.model.backbone import Backbone, weights_sha256
from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch, pack
from anchorembed.system.device import find_device
from anchorembed.train.flops import weight_count
from tiny import ARCHITECTURES, SIZES, reproduced, save_tiny, tiny_model

LENGTHS = (3, 17, 9, 1, 16)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(400, (length,), generator=generator).tolist() for length in LENGTHS]


def states(backbone: Backbone, batch: PackedBatch) -> torch.Tensor:
    return backbone.states(backbone.embed(batch.tokens), batch)


def padded_states(name: str, side: str) -> torch.Tensor:
    """The model's own forward on rows padded on one side, with an attention mask: [T, H] of the real tokens."""
    model = tiny_model(name).eval()
    model.set_attn_implementation("eager")
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences()):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[mask.bool()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_padded(name: str) -> None:
    backbone = reproduced(tiny_model(name).eval(), name)
    packed = states(backbone, pack(sequences()))
    for side in ("left", "right"):
        torch.testing.assert_close(packed, padded_states(name, side), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_gradients_equal_padded_ones(name: str) -> None:
    backbone = Backbone(tiny_model(name).eval())
    batch = pack(sequences())
    weights_TH = torch.randn(len(batch.tokens), 32, generator=torch.Generator().manual_seed(2))
    (states(backbone, batch) * weights_TH).sum().backward()
    alone = Backbone(tiny_model(name).eval())
    for start, stop in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        one = pack([batch.tokens[start:stop].tolist()])
        (states(alone, one) * weights_TH[start:stop]).sum().backward()
    for (key, ours), theirs in zip(backbone.named_parameters(), alone.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_a_broken_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without causality neither the comparison nor the loading check passes."""
    right = states(Backbone(tiny_model().eval()), pack(sequences()))
    monkeypatch.setattr(attention, "_allowed", lambda length, *_: torch.ones(length, length, dtype=torch.bool))
    broken = Backbone(tiny_model().eval())
    assert not torch.allclose(states(broken, pack(sequences())), right, atol=1e-3)
    with pytest.raises(InputError, match="differs from its own forward's"):
        reproduced(tiny_model().eval(), "tiny")


def test_sequences_are_kept_apart() -> None:
    batch = pack(sequences())
    backbone = Backbone(tiny_model().eval())
    mixed = dataclasses.replace(batch, offsets=torch.tensor([0, len(batch.tokens)]))
    assert not torch.allclose(states(backbone, mixed), states(backbone, batch), atol=1e-3)


def test_scales_are_measured() -> None:
    backbone = reproduced(tiny_model("granite").eval(), "granite")
    assert backbone.input_scale == pytest.approx(3.0)
    assert backbone.logit_scale == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=400, hidden_size=32, num_hidden_layers=2, n_layer=2, n_head=4, n_embd=32
    )
    with pytest.raises(InputError, match=kind):
        reproduced(AutoModelForCausalLM.from_config(config).eval(), kind)


@pytest.mark.parametrize(("share", "fault"), [(0.0, None), (1e-3, "change by .* with the text before it")])
def test_states_that_leak_from_text_to_text_are_seen(share: float, fault: str | None) -> None:
    """A little of the states before, as of a convolution, changes the loss less than it may."""
    model = tiny_model().eval()

    def leak(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states_1TH, *rest = arguments
        return (states_1TH + share * states_1TH.cumsum(1), *rest)

    model.base_model.norm.register_forward_pre_hook(leak)
    with pytest.raises(InputError, match=fault) if fault else nullcontext():
        reproduced(model, "tiny")


def test_experts_are_counted_and_named() -> None:
    """Of four experts two are used for a token, and adapters train none."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=400, **(SIZES | experts))
    backbone = Backbone(AutoModelForCausalLM.from_config(config).float())
    attention_weights = 2 * 32 * (4 * 8) + 2 * 32 * (2 * 8)
    assert weight_count(backbone) == 2 * (attention_weights + 2 * 3 * 32 * 16)
    add_lora(backbone, 4, 8, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert not_adapted(backbone.model) == ["down_proj", "gate_up_proj"]


def test_lora_trains_adapters_only_and_merges() -> None:
    torch.manual_seed(0)
    backbone = Backbone(tiny_model().eval())
    batch = pack(sequences())
    before = states(backbone, batch)
    add_lora(backbone, 4, 8, 0.0, ("q_proj", "down_proj", "absent"))
    trainable = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    torch.testing.assert_close(states(backbone, batch), before)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = states(backbone, batch)
    assert not torch.allclose(adapted, before, atol=1e-2)
    merge_lora(backbone)
    assert not any("lora" in name for name, _ in backbone.named_parameters())
    torch.testing.assert_close(states(backbone, batch), adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [0.05, 0.25])
def test_dropout_before_adapters_drops_its_share_and_the_same_with_the_same_seed(rate: float) -> None:
    dropout, ones = AdapterDropout(rate), torch.ones(501, 397, requires_grad=True)
    torch.manual_seed(0)
    dropped = dropout(ones)
    kept = dropped != 0
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=4 * deviation)
    assert float(kept.float().mean(0).std()) == pytest.approx((rate * (1 - rate) / 501) ** 0.5, rel=0.35)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - rate)))
    (gradient,) = torch.autograd.grad(dropped.sum(), ones)
    assert torch.equal(gradient, dropped)
    torch.manual_seed(0)
    assert torch.equal(dropout(ones), dropped)
    assert not torch.equal(dropout(ones), dropped)
    assert torch.equal(dropout.eval()(ones), ones)


def test_lora_on_a_model_without_its_targets_names_them() -> None:
    with pytest.raises(InputError, match="none of c_attn"):
        add_lora(Backbone(tiny_model()), 4, 8, 0.0, ("c_attn",))


def test_untied_heads_are_saved(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama-untied")
    assert Embedder.load(folder, device="cpu").weights_sha256 == weights_sha256(tiny_model("llama-untied"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("my model", "no such folder"),
        ("a--b", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("no-such-organisation/no-such-model", "model hub"),
    ],
)
def test_a_model_that_cannot_be_had(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        Embedder.load(name, device="cpu")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        Embedder.load(folder, device="cpu")


def test_one_gpu_is_not_given_to_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"'cuda:0' is one GPU for 2 processes\. Use auto"):
        find_device("cuda:0")
    assert find_device("cpu").type == "cpu"
