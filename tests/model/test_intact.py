"""A model that is not whole is refused by the names of what is wrong, however its weights are stored."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.intact import check_weights_finite
from anchorembed.model.load import load_model
from anchorembed.model.template import Template
from anchorembed.system.device import Weights
from tiny import SPECIALS, save_tiny, tiny_model, tiny_tokenizer

HEAD, LAYER = "lm_head.weight", "model.layers.1."


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_missing_weights_are_named_not_made_up(weights: Weights, tmp_path: Path) -> None:
    headless = change_weights(save_tiny(tmp_path / "a", "llama-untied"), lambda tensors: tensors.pop(HEAD))
    with pytest.raises(InputError, match=rf"a': its files lack {HEAD}\. They would be random"):
        load_model(str(headless), weights)
    shorter = change_weights(
        save_tiny(tmp_path / "b"),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)],
    )
    with pytest.raises(InputError, match=rf"lack {LAYER}input_layernorm\.weight, .* and 6 more"):
        load_model(str(shorter), weights)
    load_model(str(save_tiny(tmp_path / "c")), weights)  # its head is tied, and not missing


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    folder = change_weights(save_tiny(tmp_path), lambda tensors: tensors.update({"vision.patch": torch.ones(2)}))
    with pytest.raises(InputError, match=r"its architecture has no vision\.patch"):
        load_model(str(folder))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    file = save_tiny(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))
    weight = r"model\.layers\.0\.mlp\.down_proj\.weight \(\[32, 96\] instead of \[32, 64\]\)"
    with pytest.raises(InputError, match=rf"its configuration gives another shape to {weight}, .* and 3 more"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, weights: Weights, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    folder = change_weights(save_tiny(tmp_path), lambda tensors: tensors[name][2, 3].fill_(value))
    with pytest.raises(InputError, match=rf"{name} holds NaN or infinite numbers"):
        load_model(str(folder), weights)


def test_the_scales_of_quantised_weights_are_looked_at() -> None:
    """4-bit weights themselves are bytes: what is NaN in a file is so in the scales, which are stored beside them."""
    model = tiny_model()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    linear.register_buffer("nested_absmax", torch.tensor([1.0, float("nan")]))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.nested_absmax holds NaN"):
        check_weights_finite("x", model)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    tiny_model(vocabulary=386).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    Embedder.load(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|x|>", "<|y|>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"its tokenizer has 388 tokens, its weights 386\..*embeddings\(388\)"):
        Embedder.load(tmp_path)


def test_a_special_token_without_a_row_is_refused_where_it_is_used(tmp_path: Path) -> None:
    tiny_model("gemma3_text", vocabulary=386).save_pretrained(tmp_path)
    tiny_tokenizer(None, ("<image>",)).save_pretrained(tmp_path)
    embedder = Embedder.load(tmp_path)
    assert np.isfinite(embedder.encode(["a <image> of a folder"])).all(), "in a text its name is text"
    for template in (Template("<image>", "", "", "</s>"), Template("", "see <image>: ", "", "</s>")):
        with pytest.raises(InputError, match="its tokenizer has 387 tokens, its weights 386"):
            Embedder.load(tmp_path, template=template)
    tiny_tokenizer(None, pad_token="<pad>", **SPECIALS).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its tokenizer has 387 tokens, its weights 386"):
        Embedder.load(tmp_path)


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_folder_is_refused_with_the_cure(with_base: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base)))
    folder = base if with_base else tmp_path / "adapter"
    adapted.save_pretrained(folder)
    with pytest.raises(InputError, match=r"holds a peft adapter .*merge_and_unload\(\)"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_finite_weights_whose_products_overflow_are_refused(name: str, tmp_path: Path) -> None:
    folder = change_weights(save_tiny(tmp_path), lambda tensors: tensors[name].mul_(1e38))
    with pytest.raises(InputError, match="its numbers overflow, as some weights are far too large"):
        Embedder.load(folder, precision="float32")


def test_vectors_that_are_no_numbers_are_refused(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "encode_tokens", lambda *_: torch.full((1, embedder.dimension), float("nan")))
    with pytest.raises(InputError, match="gives vectors that are not finite"):
        embedder.encode(["a"])
