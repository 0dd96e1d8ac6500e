"""A fingerprint changes with each file that a vector depends on, and with nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import METADATA
from anchorembed.model.template import Template
from anchorembed.model.tokens import Lengths
from anchorembed.search.vector_cache import VectorCache
from tiny import save_tiny, tiny_model, tiny_tokenizer

TEXTS = ["Sort the List", "open a file"]


def in_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of one JSON file of a model folder."""

    def changed(folder: Path) -> None:
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        change(record)
        (folder / name).write_text(json.dumps(record), encoding="utf-8")

    return changed


def one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def special_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer(None, ("ort",))
    tokenizer.save_pretrained(folder)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": one_weight,
    "normalizer": in_json("tokenizer.json", lambda record: record.update(normalizer={"type": "Lowercase"})),
    "merges": in_json("tokenizer.json", lambda record: record["model"]["merges"].pop()),
    "special tokens": special_token,
    "rope theta": in_json("config.json", lambda record: record["rope_parameters"].update(rope_theta=500.0)),
    "epsilon": in_json("config.json", lambda record: record.update(rms_norm_eps=1e-2)),
    "window": in_json("config.json", lambda record: record.update(sliding_window=3)),
    "activation": in_json("config.json", lambda record: record.update(hidden_act="gelu")),
    "header": in_json(METADATA, lambda record: record["template"].update(header="read: ")),
    "normalisation": in_json(METADATA, lambda record: record.update(normalize=False)),
    "lengths": in_json(METADATA, lambda record: record["lengths"].update(query=12)),
    "instruction": in_json(METADATA, lambda record: record.update(prompts={"query": "find ", "document": ""})),
}
NO_CHANGES: dict[str, Callable[[Path], None]] = {
    "copy": lambda _: None,
    "names": in_json("config.json", lambda record: record.update(architectures=["X"], transformers_version="5.0")),
    "history": in_json(METADATA, lambda record: record["history"].update(base="another", date="today")),
    "stored truncation": in_json(
        "tokenizer.json",
        lambda record: record.update(
            truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
        ),
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral folder, whose config has a window as well."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny(folder / "base", "mistral")
    Embedder.load(base, precision="float32", lengths=Lengths(24, 48)).save(folder / "model")
    return folder / "model"


def changed_copy(folder: Path, target: Path, change: Callable[[Path], None]) -> Embedder:
    shutil.copytree(folder, target)
    change(target)
    return Embedder.load(target, precision="float32")


@pytest.mark.parametrize("name", CHANGES)
def test_each_file_that_decides_a_vector_changes_it(name: str, trained: Path, tmp_path: Path) -> None:
    original = Embedder.load(trained, precision="float32")
    changed = changed_copy(trained, tmp_path / "changed", CHANGES[name])
    assert changed.fingerprint != original.fingerprint
    cached = VectorCache(original, tmp_path / "vectors").vectors(TEXTS, "query", "")
    vectors = VectorCache(changed, tmp_path / "vectors").vectors(TEXTS, "query", "")
    assert cached.shape == vectors.shape
    assert len(list((tmp_path / "vectors").iterdir())) == 2, "no vector of the other model is reused"


@pytest.mark.parametrize("name", NO_CHANGES)
def test_what_decides_no_vector_leaves_it(name: str, trained: Path, tmp_path: Path) -> None:
    original = Embedder.load(trained, precision="float32")
    copied = changed_copy(trained, tmp_path / "copy", NO_CHANGES[name])
    assert copied.fingerprint == original.fingerprint
    copied.encode(TEXTS)
    assert copied.fingerprint == original.fingerprint == Embedder.load(tmp_path / "copy").fingerprint
    np.testing.assert_array_equal(copied.encode(TEXTS), original.encode(TEXTS))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_folder_saved_again_has_the_same(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_model("gemma3_text").to(stored).save_pretrained(tmp_path / "base")
    tiny_tokenizer(None, ("<|x|>",)).save_pretrained(tmp_path / "base")
    template = Template("<s>", "<|x|>read: ", "", "</s>")
    original = Embedder.load(tmp_path / "base", precision="float32", template=template)
    original.save(tmp_path / "saved")
    assert Embedder.load(tmp_path / "saved", precision="float32").fingerprint == original.fingerprint
