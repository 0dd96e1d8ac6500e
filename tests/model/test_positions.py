"""No text is longer than the model has positions for, or than its rotary frequencies stay the same for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from tiny import SIZES, tiny_tokenizer

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}


def save(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 64, "vocab_size": 400} | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_limit_above_the_models_positions_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(InputError, match=r"data\.document_tokens: 1024 is above 64, the max_position_embeddings of"):
        Embedder.load(folder, lengths=Lengths(64, 1024))
    with pytest.raises(InputError, match=r"data\.query_tokens: 65 is above 64"):
        Embedder.load(folder, lengths=Lengths(65, 64))
    assert Embedder.load(folder).metadata.lengths == Lengths(64, 64)


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, 64),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, 32),
        ("llama", {"rope_parameters": YARN}, 64),
    ],
)
def test_a_text_does_not_depend_on_its_company(kind: str, settings: dict[str, Any], most: int, tmp_path: Path) -> None:
    folder = save(tmp_path, kind, **settings)
    with pytest.raises(InputError, match=f"data.query_tokens: {most + 1} is above {most}"):
        Embedder.load(folder, precision="float32", lengths=Lengths(most + 1, most))
    embedder = Embedder.load(folder, precision="float32", lengths=Lengths(most, most))
    texts = ["sort the list", "open a file and read it line by line " * 20]
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-5)


def test_beyond_the_original_context_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal, the test above would fail for such positions."""
    monkeypatch.setattr("anchorembed.model.embedder.check_lengths", lambda *_: None)
    folder = save(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)
    embedder = Embedder.load(folder, precision="float32", lengths=Lengths(64, 64))
    texts = ["sort the list", "open a file and read it line by line " * 20]
    assert np.abs(embedder.encode(texts)[0] - embedder.encode(texts[:1])[0]).max() > 1e-3
