"""Exports load in sentence-transformers 5.1 with transformers 4.57, with our vectors.

`make test-older` runs this in an environment without AnchorEmbed, after write_exports.py; $EXPORTS is what that wrote.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(os.environ["EXPORTS"])
TEXTS = json.loads((ROOT / "texts.json").read_text(encoding="utf-8"))
MODELS = sorted(path.name for path in ROOT.iterdir() if path.is_dir())


def options(name: str) -> dict[str, str]:
    """What a model needs here: the default attention of transformers 4.57 leaves out Gemma 2's soft-cap."""
    return {"attn_implementation": "eager"} if name == "gemma2" else {}


def difference(folder: Path, name: str) -> float:
    """Largest difference of an export's vectors from ours."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs=options(name))
    expected = np.load(ROOT / name / "vectors.npz")
    query, document = model.encode_query(TEXTS), model.encode_document([*TEXTS, ""])
    return float(max(np.abs(query - expected["query"]).max(), np.abs(document - expected["document"]).max()))


def test_the_libraries_are_older() -> None:
    assert transformers.__version__.startswith("4.")
    assert len(MODELS) >= 8


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_our_vectors(name: str) -> None:
    assert difference(ROOT / name / "float32", name) < 1e-4
    assert difference(ROOT / name / "bfloat16", name) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_our_vectors(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / name / "saved")
    model = AutoModelForCausalLM.from_pretrained(ROOT / name / "saved", **options(name)).model.eval()
    expected = np.load(ROOT / name / "vectors.npz")["document"]
    for text, vector in zip([*TEXTS, ""], expected, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
        with torch.inference_mode():
            state = model(**tokens).last_hidden_state[0, -1]
        assert np.abs((state / state.norm()).numpy() - vector).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama3", "gemma3_text"])
@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "rope_local_base_freq"])
def test_without_a_rotary_setting_they_differ(name: str, key: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / name / "float32", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
    if config.pop(key, None) is None:
        return
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert difference(tmp_path / "copy", name) > 1e-2
