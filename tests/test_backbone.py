"""Packed = padded for every kind of decoder, and what is not reproduced is refused by name."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from anchorembed import attention, layers
from anchorembed import backbone as backbone_module
from anchorembed.backbone import Backbone, LoraSettings, load_backbone, reproduce, use_gpu_kernels, weights_sha256
from anchorembed.errors import InputError
from anchorembed.packing import PackedBatch, lay_out, pack
from anchorembed.runtime import find_device
from conftest import ARCHITECTURES, save_tiny, tiny_model

CPU = torch.device("cpu")
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
    backbone = Backbone(tiny_model(name).eval())
    reproduce(backbone, name)
    packed = states(backbone, pack(sequences()))
    for side in ("left", "right"):
        torch.testing.assert_close(packed, padded_states(name, side), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_long_sequences_take_another_way_to_the_same(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own attention, with and without a window, in fused layers and in the model's: states and gradients."""
    found = []
    for short in (512, 0):
        for module in (attention, layers):
            monkeypatch.setattr(module, "SHORT", short)
        backbone = Backbone(tiny_model(name).eval())
        if fused:
            reproduce(backbone, name)
        packed = states(backbone, pack(sequences()))
        packed.square().sum().backward()
        found.append([packed.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
    for long, short_one in zip(*found, strict=True):
        torch.testing.assert_close(long, short_one, rtol=1e-3, atol=1e-3)


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
    """Without causality, or with sequences not kept apart, neither the comparison nor the loading check passes."""
    right = states(Backbone(tiny_model().eval()), pack(sequences()))
    monkeypatch.setattr(
        attention,
        "_causal",
        lambda q, k, v, scaling, *rest: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling),
    )
    broken = Backbone(tiny_model().eval())
    assert not torch.allclose(states(broken, pack(sequences())), right, atol=1e-3)
    with pytest.raises(InputError, match="differs from its own forward's"):
        reproduce(broken, "tiny")


def test_sequences_are_kept_apart() -> None:
    batch = pack(sequences())
    one_long = lay_out(torch.tensor([0, len(batch.tokens)]))
    backbone = Backbone(tiny_model().eval())
    right = states(backbone, batch)
    mixed = PackedBatch(batch.tokens, batch.offsets)
    mixed.__dict__["buckets"] = one_long
    assert not torch.allclose(states(backbone, mixed), right, atol=1e-3)


def test_scales_are_measured() -> None:
    backbone = Backbone(tiny_model("granite").eval())
    reproduce(backbone, "granite")
    assert backbone.input_scale == pytest.approx(3.0)
    assert backbone.logit_scale == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=400, hidden_size=32, num_hidden_layers=2, n_layer=2, n_head=4, n_embd=32
    )
    with pytest.raises(InputError, match=kind):
        reproduce(Backbone(AutoModelForCausalLM.from_config(config).eval()), kind)


def test_lora_trains_adapters_only_and_merges() -> None:
    torch.manual_seed(0)
    backbone = Backbone(tiny_model().eval())
    batch = pack(sequences())
    before = states(backbone, batch)
    backbone.add_lora(LoraSettings(4, 8, 0.0, ("q_proj", "down_proj", "absent")))
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
    backbone.merge_lora()
    assert not any("lora" in name for name, _ in backbone.named_parameters())
    torch.testing.assert_close(states(backbone, batch), adapted, rtol=1e-3, atol=1e-4)


def test_lora_on_a_model_without_its_targets_names_them() -> None:
    with pytest.raises(InputError, match="none of c_attn"):
        Backbone(tiny_model()).add_lora(LoraSettings(4, 8, 0.0, ("c_attn",)))


def test_untied_heads_are_saved(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama-untied")
    loaded, _ = load_backbone(str(folder), CPU)
    assert weights_sha256(loaded.model) == weights_sha256(tiny_model("llama-untied"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no folder"),
        ("nowhere.gguf", "no file"),
        ("no-such-organisation/no-such-model", "model hub"),
    ],
)
def test_a_model_that_cannot_be_had(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        load_backbone(name, CPU)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(str(folder), CPU)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_kernels_for_packed_sequences_get_what_they_need(name: str) -> None:
    """A stand-in for flash attention that reads only what transformers hands to it gives our states."""
    backbone = Backbone(tiny_model(name).eval())
    reproduce(backbone, name)
    batch = pack([[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]])
    expected = states(backbone, batch)

    def varlen(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == 6
        parts = []
        for first, last in itertools.pairwise(kwargs["cu_seq_lens_q"].tolist()):
            q, k, v = (side[:, :, first:last] for side in (query, key, value))
            k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
            scores = q @ k.transpose(2, 3) * scaling
            if kwargs.get("softcap"):
                scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
            allowed = torch.ones(last - first, last - first, dtype=torch.bool).tril()
            if kwargs.get("sliding_window"):
                allowed = allowed.triu(1 - kwargs["sliding_window"])
            parts.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
        return torch.cat(parts, 2).transpose(1, 2), None

    AttentionInterface.register("stand_in", varlen)
    backbone.model.set_attn_implementation("stand_in")
    backbone.varlen = True
    torch.testing.assert_close(states(backbone, batch), expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_that_does_not_serve_a_model_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny_model().eval())
    before = backbone.model.config._attn_implementation
    monkeypatch.setattr(backbone_module, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(
        backbone.model, "set_attn_implementation", lambda _: (_ for _ in ()).throw(ValueError("head size"))
    )
    with pytest.warns(UserWarning, match="not by flash attention, which is installed .head size"):
        use_gpu_kernels(backbone)
    assert backbone.model.config._attn_implementation == before
    assert not backbone.varlen


def test_one_gpu_is_not_given_to_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"'cuda:0' is one for 2 processes\. Use auto"):
        find_device("cuda:0")
    assert find_device("cpu").type == "cpu"
