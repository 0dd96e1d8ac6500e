"""Frozen weights in bfloat16 or 4 bits under float32 adapters: they learn, are saved as a normal model, or refused."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from anchorembed.compare.plan import open_comparison
from anchorembed.errors import InputError
from anchorembed.model import attention
from anchorembed.model import load as models
from anchorembed.model.adapters import add_lora
from anchorembed.model.backbone import weights_sha256
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import check_nf4
from anchorembed.model.metadata import read_metadata
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train import memory_estimate
from anchorembed.train import run as training
from anchorembed.train.flops import weight_count
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.prepare import prepare
from anchorembed.train.profile import profile
from anchorembed.train.run import contrast, reconstruct, train
from anchorembed.train.stage import step
from stages import ready
from tiny import ARCHITECTURES, SIZES, reproduced, tiny_model, tiny_tokenizer, write_pairs

Make = Callable[..., Recipe]
CPU = torch.device("cpu")
TEXTS = ["read file list", "sort the rows of a table", "link"]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose widths are whole blocks of 64, which 4-bit weights are quantised in."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    config = AutoConfig.for_model("llama", vocab_size=400, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, wide_folder: Path) -> Make:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 80)

    def make(weights: str, output: str = "run", **changes: Any) -> Recipe:
        common = {"batch_size": 8, "warmup_steps": 2, "steps": 8, "evaluate_every": 8, "learning_rate": 3e-3}
        stages = {"reconstruct": None, "contrast": common} | changes
        source = {"name": "p", "path": str(pairs)}
        data = {"sources": [source], "query_tokens": 24, "document_tokens": 48, "held_out": 8}
        model = {"name": str(wide_folder), "device": "cpu", "weights": weights}
        return parse_recipe({"data": data, "model": model, "output": str(tmp_path / output), **stages})

    return make


def losses(model: Path) -> list[float]:
    lines = (model.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_is_the_model_s_own_in_bfloat16(name: str) -> None:
    reproduced(tiny_model(name).eval().to(torch.bfloat16), name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_broken_mask_is_seen_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_allowed", lambda length, *_: torch.ones(length, length, dtype=torch.bool))
    with pytest.raises(InputError, match=r"over 0\.03"):
        reproduced(tiny_model(name).eval().to(torch.bfloat16), name)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_adapters_and_moments_are_float32_and_nothing_else_trains(recipe: Make, weights: str) -> None:
    wanted = recipe(weights)
    prepared = prepare(wanted, wanted.model.name)
    run = ready(prepared.embedder, wanted.contrast)
    module = run.module
    optimizer = make_optimizer(module, wanted.contrast)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for number in range(2):
        step(run, number, prepared.tokens(list(range(8)), 0))
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert all(moment.dtype == torch.float32 for state in optimizer.state.values() for moment in state.values())
    frozen = {weight.dtype for name, weight in module.named_parameters() if name not in trained}
    assert frozen == ({torch.bfloat16, torch.uint8} if weights == "nf4" else {torch.bfloat16})
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == trained.keys()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_it_learns_and_saves_a_normal_model(
    recipe: Make, weights: str, wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Embedder] = []
    real = training.prepare

    def keep(*args: Any) -> Any:
        prepared = real(*args)
        kept.append(prepared.embedder)
        return prepared

    seen: list[np.ndarray] = []
    write = training.whole_folder

    def look(target: Path) -> Any:
        seen.append(kept[0].encode(TEXTS))
        return write(target)

    monkeypatch.setattr(training, "prepare", keep)
    monkeypatch.setattr(training, "whole_folder", look)
    model = contrast(recipe(weights, contrast={"batch_size": 8, "steps": 40, "learning_rate": 3e-3, "warmup_steps": 2}))
    found = losses(model)
    assert sum(found[-8:]) < 0.9 * sum(found[:8])
    saved = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert saved.keys() == load_file(wide_folder / "model.safetensors").keys()
    metadata = read_metadata(model)
    assert metadata is not None
    assert metadata.history["weights"] == (
        f"adapters trained on {weights} weights and merged into those, saved in bfloat16"
    )
    vectors = Embedder.load(model, precision="bfloat16").encode(TEXTS)
    untrained = Embedder.load(wide_folder, precision="bfloat16").encode(TEXTS)
    cosines, others = ((seen[0] * side).sum(1) for side in (vectors, untrained))
    assert cosines.min() > 0.999
    assert others.max() < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_both_stages_train_adapters_on_them(recipe: Make, weights: str) -> None:
    common = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2}
    model = train(recipe(weights, reconstruct=common | {"steps": 40, "lora": {}}, contrast=common | {"steps": 8}))
    first = model.parents[1] / "reconstruct" / "model"
    found = losses(first)
    assert sum(found[-8:]) < 0.9 * sum(found[:8])
    for folder in (first, model):
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    before, after = (Embedder.load(folder, precision="bfloat16").encode(TEXTS) for folder in (first, model))
    assert (before * after).sum(1).max() < 0.9999, "Stage II goes on from Stage I's"


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "nf4"])
def test_all_weights_train_in_float32_alone(recipe: Make, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("refused before anything is loaded")

    monkeypatch.setattr(training, "shape_of_model", load)
    monkeypatch.setattr(training, "prepare", load)
    wanted = recipe(weights, reconstruct={"steps": 2})
    for run in (train, reconstruct):
        with pytest.raises(InputError, match=rf"{weights} is for .* reconstruct\.lora=.* run reconstruct with"):
            run(wanted)
    wanted = recipe(weights, contrast={"lora": None})
    for run in (train, contrast):
        with pytest.raises(InputError, match=r"contrast\.lora is null.*set model\.weights=float32"):
            run(wanted)
    assert not wanted.output.exists()
    with pytest.raises(InputError, match=r"contrast\.lora is null"):
        profile(wanted, "contrast", steps=1)


def test_a_comparison_trains_all_weights(recipe: Make, tmp_path: Path) -> None:
    wanted = recipe("bfloat16", compare={"collections": {"t": ["x"]}})
    with pytest.raises(InputError, match=r"model\.weights: bfloat16 is for LoRA alone.*float32"):
        open_comparison(wanted, tmp_path / "results")


def test_the_second_stage_may_have_other_weights_than_the_first(recipe: Make, said: list[str]) -> None:
    """Stage I's plan has no word of how Stage II stores the weights; Stage II's has."""
    stage_one = {"steps": 2, "batch_size": 8, "warmup_steps": 1}
    reconstruct(recipe("float32", reconstruct=stage_one))
    wanted = recipe("bfloat16", reconstruct=stage_one, contrast={"steps": 2, "batch_size": 8, "warmup_steps": 1})
    contrast(wanted)
    assert any("reconstruct/model" in line for line in said)
    changed = recipe("float32", reconstruct=stage_one, contrast={"steps": 2, "batch_size": 8, "warmup_steps": 1})
    with pytest.raises(InputError, match=r"model\.weights was 'bfloat16', is 'float32' now"):
        contrast(changed)


def test_products_with_bfloat16_weights_are_bfloat16(recipe: Make) -> None:
    wanted = recipe("bfloat16")
    model = wanted.model.model_copy(update={"precision": "float32"})
    with pytest.raises(InputError, match=r"model\.precision: float32.*Set it to auto"):
        contrast(wanted.model_copy(update={"model": model}))


def test_without_bitsandbytes_that_is_said(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"nf4 needs bitsandbytes.*pip install bitsandbytes.*model\.weights=bfloat16"):
        contrast(recipe("nf4"))


class Broken:
    """A bitsandbytes that raises, or gives other numbers than it was given."""

    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault

    def quantize_4bit(self, numbers: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        if self.fault:
            raise self.fault
        return numbers, None

    def dequantize_4bit(self, numbers: torch.Tensor, _: None) -> torch.Tensor:
        return -numbers


@pytest.mark.parametrize(
    ("fault", "message"),
    [(RuntimeError("no kernel image\nmore"), r"does not run on cpu: no kernel image Use"), (None, "wrong numbers")],
)
def test_a_bitsandbytes_that_cannot_run(fault: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: True)
    monkeypatch.setattr(models, "import_module", lambda _: Broken(fault))
    with pytest.raises(InputError, match=message):
        check_nf4("any", CPU)


def test_gguf_is_not_quantised_again() -> None:
    with pytest.raises(InputError, match=r"nf4 cannot be made of 'a\.gguf'"):
        check_nf4("a.gguf", CPU)


@needs_bitsandbytes
def test_four_bits_are_four_bits_and_count_as_what_they_stand_for(wide_folder: Path) -> None:
    plain = Embedder.load(wide_folder, device="cpu").backbone
    packed = Embedder.load(wide_folder, device="cpu", weights="nf4").backbone
    assert packed.model.is_loaded_in_4bit
    assert not getattr(plain.model, "is_loaded_in_4bit", False)
    module = packed.model.base_model.layers[0].mlp.down_proj
    assert module.weight.dtype == torch.uint8
    count, state = module.in_features * module.out_features, module.weight.quant_state
    held = module.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert held == pytest.approx(count * memory_estimate._NF4, rel=0.01)
    assert weight_count(packed) == weight_count(plain)
    with pytest.raises(InputError, match="none of c_attn"):
        add_lora(packed, 4, 8, 0.0, ("c_attn",))


def test_a_hash_does_not_depend_on_how_weights_are_stored() -> None:
    low = tiny_model().to(torch.bfloat16)
    assert weights_sha256(low) == weights_sha256(tiny_model().to(torch.bfloat16).float())
    assert weights_sha256(low) != weights_sha256(tiny_model())


def test_a_model_saved_from_bfloat16_is_known_by_its_hash(wide_folder: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(wide_folder, weights="bfloat16")
    assert embedder.backbone.weights_dtype == torch.bfloat16
    assert embedder.encode(TEXTS).dtype == np.float32
    embedder.save(tmp_path)
    record = json.loads((tmp_path / "anchorembed.json").read_text(encoding="utf-8"))
    assert record["weights_sha256"] == Embedder.load(tmp_path).weights_sha256
