"""What a stage takes: exact where it is a sum of tensors, near where it is what layers keep; refused with figures."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from anchorembed.errors import InputError
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Contrast, Lora, Recipe, Reconstruct
from anchorembed.system import device
from anchorembed.train import loop as loop_module
from anchorembed.train import run as training
from anchorembed.train.check_memory import check_memory, cure, less_memory
from anchorembed.train.contrast import Contrastive
from anchorembed.train.memory_estimate import (
    _BUDGETS,
    Shape,
    Use,
    estimate,
    fitting_budget,
    layer_bytes,
    shape_of,
    stored_bytes,
    use_of,
)
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.prepare import load_embedder, prepare
from anchorembed.train.run import contrast
from anchorembed.train.stage import step
from stages import KINDS, ready
from tiny import recipe_values, save_tiny, write_pairs

CARD = 80 * 10**9
LLAMA_8B = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS = {"data": {"sources": [{"name": "a", "path": "x"}]}, "output": "o"}


def use(weights: str = "float32", stage: str = "contrast", **changes: Any) -> Use:
    """The paper's settings, with another way to store weights."""
    recipe = parse_recipe(PAIRS | {"model": {"weights": weights}, stage: changes})
    settings = recipe.contrast if stage == "contrast" else recipe.reconstruct
    assert settings is not None
    return use_of(recipe, settings, KINDS[type(settings)].step_size(settings, recipe.data), torch.bfloat16, 2**28)


@pytest.fixture(scope="session")
def eight_billion() -> Shape:
    return shape_of(LLAMA_8B)


def test_an_8b_model_s_second_stage_fits_a_card_and_its_first_does_not(eight_billion: Shape) -> None:
    assert eight_billion.count == 8_030_261_248
    assert estimate(eight_billion, use("bfloat16")).total < CARD
    assert estimate(eight_billion, use("nf4")).total < estimate(eight_billion, use("bfloat16")).total
    assert estimate(eight_billion, use("float32")).total > CARD
    assert estimate(eight_billion, use(stage="reconstruct")).fixed == 16 * eight_billion.count > CARD
    shared = replace(use(stage="reconstruct"), shards=8)
    assert estimate(eight_billion, shared).fixed == 2 * eight_billion.count


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: save_tiny(tmp_path_factory.mktemp(name), name)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen3", "phi"])
@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (Reconstruct(), "float32"),
        (Contrast(lora=None), "float32"),
        (Contrast(), "float32"),
        (Contrast(), "bfloat16"),
    ],
    ids=["stage-one", "full", "adapters", "adapters-on-bfloat16"],
)
def test_weights_gradients_and_moments_are_exact(
    name: str, settings: Any, weights: str, tmp_path: Path, models_of: Callable[[str], Path]
) -> None:
    folder = models_of(name)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    data = {"sources": [{"name": "p", "path": str(pairs)}], "query_tokens": 24, "document_tokens": 48, "held_out": 4}
    model = {"name": str(folder), "device": "cpu", "weights": weights}
    recipe = parse_recipe({"data": data, "model": model, "output": "o"})
    prepared = prepare(recipe, str(folder))
    config = prepared.embedder.backbone.model.config
    size = KINDS[type(settings)].step_size(settings, recipe.data)
    found = estimate(shape_of(config), use_of(recipe, settings, size, torch.float32, 2**20))
    run = ready(prepared.embedder, settings)
    module = run.module
    optimizer = make_optimizer(module, settings)
    step(run, 0, prepared.tokens(list(range(4)), 0))
    optimizer.step()
    every = {weight.data_ptr(): weight for weight in module.parameters()}.values()
    gradients = [weight.grad for weight in every if weight.grad is not None]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert found.weights == bytes_of(every)
    assert found.gradients == bytes_of(gradients)
    assert found.moments == bytes_of(moments)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights", "product", "rank", "dropout"),
    [
        ("llama", "float32", 2, 0, 0.0),
        ("llama", "float32", 4, 0, 0.0),
        ("qwen3", "float32", 2, 0, 0.0),
        ("llama", "bfloat16", 2, 4, 0.05),
        ("qwen3", "bfloat16", 2, 4, 0.05),
        ("llama", "bfloat16", 2, 4, 0.0),
        ("qwen3", "float32", 4, 4, 0.05),
    ],
)
def test_what_a_compiled_layer_keeps(kind: str, weights: str, product: int, rank: int, dropout: float) -> None:
    """Three layers less two, as autograd keeps them for the backward pass, within a twentieth."""
    torch._dynamo.reset()
    kept = []
    for layers in (2, 3):
        config = AutoConfig.for_model(
            kind,
            hidden_size=80,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=64,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        stored = torch.float32 if weights == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=stored)
        shape = shape_of(config)
        if rank:
            get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=TARGETS))
        kept.append(kept_of_a_token(model, product == 2))
    lora = Lora(rank=rank, dropout=dropout, targets=TARGETS) if rank else None
    expected = use(weights)
    expected = replace(expected, product=product, size=replace(expected.size, lora=lora))
    assert layer_bytes(shape, expected) == pytest.approx(kept[1] - kept[0], rel=0.05)


def partitioned(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor's graphs, forward and backward, run as they are: what is kept is decided before code is generated."""
    return compile_fx(graph, inputs, inner_compile=lambda part, *_, **__: make_boxed_func(part.forward))


def kept_of_a_token(model: PreTrainedModel, low: bool, tokens: int = 389) -> float:
    """Bytes a token that autograd keeps of what is as long as the text, each layer compiled."""
    model.set_attn_implementation("sdpa")
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        layer.compile(fullgraph=True, dynamic=True, backend=partitioned)
    model.train()
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tokens in tensor.shape:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model.base_model(input_ids=torch.arange(tokens)[None] % 64, use_cache=False).last_hidden_state

    forward().float().sum().backward()  # compiles
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / tokens


def test_recomputed_layers_keep_their_input_alone(eight_billion: Shape) -> None:
    whole = use("bfloat16")
    again = estimate(eight_billion, replace(whole, recompute=True)).activations
    inputs = 8192 * 2 * 4096 * 32
    assert inputs < again < inputs + 2 * estimate(eight_billion, whole).activations / 32


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_the_residual_stream_is_estimated_as_it_is(
    stored: str, residual: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr(device, "_cpu_multiplies_bfloat16", lambda: multiplies)
    model = {"name": str(tiny_folder), "device": "cpu", "weights": stored, "residual": residual}
    recipe = parse_recipe(PAIRS | {"model": model})
    embedder = load_embedder(recipe, recipe.model.name, "cpu")
    sizes: list[int] = []
    for layer in embedder.backbone.layers:
        layer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].element_size()))
    embedder.encode(["some text"])
    size = Contrastive.step_size(Contrast(), recipe.data)
    assert sizes == [use_of(recipe, Contrast(), size, embedder.dtype, 0).stream] * 2


def test_what_it_says(eight_billion: Shape) -> None:
    said = check_memory("contrast", eight_billion, use("bfloat16"), CARD, "cuda:0", strict=True)
    assert said.startswith("contrast: about 72 GB of cuda:0's 80: weights 16, gradients 0.17, moments 0.34, ")
    assert check_memory("contrast", eight_billion, use(), 0, "cuda:0", strict=True).startswith(
        "contrast: about 105 GB: "
    )
    few = str(estimate(eight_billion, replace(use(), size=replace(use().size, queries=2, documents=2))))
    assert "weights 32" in few
    assert "embeddings" not in few, "less than a thousandth of it all says nothing"


def test_what_cannot_fit_is_refused_with_figures_and_a_cure(eight_billion: Shape) -> None:
    def refused(have: float, wanted: Use, stage: str = "contrast") -> str:
        with pytest.raises(InputError) as caught:
            check_memory(stage, eight_billion, wanted, int(have), "cuda:0", strict=True)
        return str(caught.value)

    said = refused(80e9, use(stage="reconstruct"), "reconstruct")
    assert said.startswith("reconstruct: weights 32, gradients 32 and moments 64 GB are 128 GB, and cuda:0 has 80. ")
    assert said.endswith("Train adapters: set reconstruct.lora={}. Set model.weights=bfloat16.")
    with_adapters = use(stage="reconstruct", lora={})
    assert "Set model.weights=bfloat16" in refused(60e9, with_adapters, "reconstruct")
    assert "Share it out over several GPUs (recipes/accelerate has FSDP2)" in refused(4e9, use("nf4"))
    said = refused(80e9, use())
    assert "it takes about 105 GB" in said
    assert "Set contrast.tokens_per_micro_batch=4096 (it is 8192)" in said
    lower = replace(use(), budget=4096)
    assert estimate(eight_billion, lower).total < 80e9, "the cure cures"
    assert "Set model.weights=bfloat16 and contrast.tokens_per_micro_batch=" in refused(24e9, use())
    assert "Set model.weights=nf4" in refused(12e9, use("bfloat16"))
    assert "smaller model" in refused(6e9, replace(use(), shards=8)), "only float32 is sharded"
    said = refused(80e9, use(lora=None))
    assert said.startswith("contrast: weights 32, gradients 30 and moments 60 GB are 122 GB, and cuda:0 has 80. ")
    assert "leave out contrast.lora=null. Set contrast.tokens_per_micro_batch=4096" in said
    assert "smaller model" in refused(4e9, use("nf4"))


def test_what_is_only_estimated_refuses_no_cpu(eight_billion: Shape) -> None:
    assert "about 105 GB of" in check_memory("contrast", eight_billion, use(), CARD, "this machine", strict=False)
    with pytest.raises(InputError, match="are 33 GB"):
        check_memory("contrast", eight_billion, use(), CARD // 4, "this machine", strict=False)


def test_what_to_lower_where_memory_ended() -> None:
    assert "Set contrast.tokens_per_micro_batch=4096 (it is 8192)" in less_memory("contrast", use())
    least = replace(use(), budget=1000)
    assert "model.weights=bfloat16" in less_memory("contrast", least)
    assert "model.weights=nf4" in less_memory("contrast", replace(least, weights="bfloat16"))
    assert "data.query_tokens" in less_memory("contrast", replace(least, weights="nf4"))
    few = use(batch_size=2, tokens_per_micro_batch=65536)  # a step has 2 * 3 * 512 tokens
    assert "Set contrast.tokens_per_micro_batch=1536 (it is 65536)" in less_memory("contrast", few)
    first = replace(use(stage="reconstruct"), budget=3000)  # a pair may have 2,052 tokens
    assert "a micro-batch has 3000 tokens, the longest pair" in less_memory("reconstruct", first)


def test_a_small_step_takes_less_than_its_budget() -> None:
    assert use(batch_size=2).tokens == 2 * 3 * 512
    assert use(stage="reconstruct", batch_size=2).tokens == 2 * 2 * 1026
    assert use(stage="reconstruct", tokens_per_micro_batch=100).tokens == 2 * 1026
    assert use(stage="reconstruct", directions="q2d", tokens_per_micro_batch=100).tokens == 1026


def test_four_bits_are_counted_with_their_scales(eight_billion: Shape) -> None:
    products = eight_billion.products
    rest = 2 * (eight_billion.count - products)
    assert 0.515 * products < stored_bytes(eight_billion, "nf4") - rest < 0.517 * products


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Recipe:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 80)
    stage = {"batch_size": 8, "steps": 6, "warmup_steps": 1, "save_every": 2, "evaluate_every": 5}
    stages = {"reconstruct": None, "contrast": stage}
    return parse_recipe(recipe_values(pairs, tiny_folder, tmp_path / "run") | stages)


def fail_in(monkeypatch: pytest.MonkeyPatch, where: str, number: int, error: Exception) -> None:
    """Have Stage II raise an error in step ``number``, counted from 0: as it runs, or as it is laid out in a thread."""
    real, calls = getattr(Contrastive, where), count()

    def failing(self: Contrastive, *arguments: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(self, *arguments)

    monkeypatch.setattr(Contrastive, where, failing)


@pytest.mark.parametrize("kind", ["mamba", "distilbert"])
def test_a_model_that_cannot_be_trained_is_refused_by_name(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    AutoConfig.for_model(kind, vocab_size=400).save_pretrained(tmp_path / "other")
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path / "other")})})
    with pytest.raises(InputError, match=rf"other' \({kind}\) cannot run: .*Use a causal decoder"):
        contrast(other)
    (tmp_path / "other" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="Merge it first"):
        contrast(other)


def test_a_guide_takes_memory(eight_billion: Shape) -> None:
    alone = use("bfloat16")
    beside = replace(alone, guide=4 * eight_billion.count)
    assert estimate(eight_billion, beside).total == estimate(eight_billion, alone).total + 4 * eight_billion.count
    assert fitting_budget(eight_billion, beside, CARD) < fitting_budget(eight_billion, alone, CARD)
    with pytest.raises(InputError, match=r"the guide 32, weights .* GB are"):
        check_memory("contrast", eight_billion, beside, 40 * 10**9, "cuda:0", strict=True)


@pytest.mark.parametrize(
    ("ends_in", "where"), [(0, "run"), (3, "run"), (4, "run"), (0, "make_batch"), (3, "make_batch")]
)
def test_memory_that_ends_in_a_step_loses_nothing(
    recipe: Recipe, ends_in: int, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]
) -> None:
    """One message; the steps before are kept, also those after the last checkpoint; a smaller budget goes on."""
    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    whole = recipe.model_copy(update={"output": tmp_path / "whole"})
    expected = contrast(whole)
    fail_in(monkeypatch, where, ends_in, out)
    kept = f"Steps up to {ends_in} are kept" if ends_in else "No step is lost"
    with pytest.raises(InputError) as caught:
        contrast(recipe)
    assert str(caught.value) == (
        f"contrast: memory ended after step {ends_in}: CUDA out of memory. Tried to allocate 2.00 GiB. "
        f"Set contrast.tokens_per_micro_batch=480 (it is 8192), which a started run may change. {kept}."
    )
    monkeypatch.undo()
    smaller = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update={"tokens_per_micro_batch": 480})})
    finished = contrast(smaller)
    assert any(f"resumed after step {ends_in} of 6" in line for line in said) == bool(ends_in)
    assert (finished / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_memory_that_ends_as_the_steps_are_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the last checkpoint stands; an error of another kind is not taken for it."""
    save = loop_module.save_checkpoint

    def only_even(folder: Path, step: int, *rest: Any) -> None:
        if step % 2:
            raise MemoryError
        save(folder, step, *rest)

    fail_in(monkeypatch, "run", 3, RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    monkeypatch.setattr(loop_module, "save_checkpoint", only_even)
    with pytest.raises(InputError, match="The last checkpoint is kept"):
        contrast(recipe)
    assert [path.name for path in (recipe.output / "contrast" / "checkpoints").glob("step-*")] == ["step-000002"]
    fail_in(monkeypatch, "run", 0, RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        contrast(recipe)


@pytest.mark.parametrize(("step", "kept"), [(1, "There is no checkpoint yet"), (3, "The last checkpoint is kept")])
def test_several_processes_keep_the_last_checkpoint_if_there_is_one(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int, kept: str
) -> None:
    fail_in(monkeypatch, "run", step, MemoryError())
    monkeypatch.setattr(loop_module, "processes", lambda: 2)
    with pytest.raises(InputError, match=kept):
        contrast(recipe)
    assert len([*(recipe.output / "contrast" / "checkpoints").glob("step-*")]) == step // 2


def test_it_is_said_before_the_run_and_refused_before_the_model_is_loaded(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    contrast(recipe)
    place = next(number for number, line in enumerate(said) if "about" in line)
    assert "weights" in said[place]
    assert place < next(number for number, line in enumerate(said) if "pairs to train on" in line)
    monkeypatch.setattr(training, "memory_of", lambda _: 1000)
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r"GB, and this machine has 1e-06"):
        contrast(recipe.model_copy(update={"output": recipe.output.parent / "other"}))


def test_a_cure_is_named_only_if_it_cures(eight_billion: Shape) -> None:
    assert "smaller model" in cure("contrast", eight_billion, use("float32"), 10**9)


@pytest.mark.parametrize("stage", ["reconstruct", "contrast"])
def test_the_chosen_budget_is_the_largest_that_fits_nine_tenths(eight_billion: Shape, stage: str) -> None:
    """More memory never means fewer tokens at once; where none fits it is the smallest, which is then refused."""
    wanted = use("bfloat16" if stage == "contrast" else "float32", stage)
    chosen = []
    for size in range(20, 1000, 20):
        have = size * 10**9
        budget = fitting_budget(eight_billion, wanted, have)
        chosen.append(budget)
        fits = [
            other for other in _BUDGETS if estimate(eight_billion, replace(wanted, budget=other)).total <= 0.9 * have
        ]
        assert budget == (max(fits) if fits else 2048)
    assert chosen == sorted(chosen)
    assert chosen[0] == 2048
    assert chosen[-1] == 65536
    assert len(set(chosen)) > 4
