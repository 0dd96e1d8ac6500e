"""Cross-encoders: logits as transformers computes them; what is no whole one is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from anchorembed.curate.rerank import by_cross_encoder
from anchorembed.errors import InputError
from tiny import save_cross_encoder

PAIRS = [("sort a list", "list.sort() sorts in place"), ("x", "y"), ("read a file", "open it " * 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("reranker"))


@pytest.mark.slow
def test_scores_are_the_models_logits(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        expected = [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in PAIRS]
    assert by_cross_encoder(folder)(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert min(expected) < 0
    CrossEncoder(str(folder)).save_pretrained(str(tmp_path / "saved"))
    assert by_cross_encoder(tmp_path / "saved")(PAIRS) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_of_long_texts_only_the_beginning_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_cross_encoder(tmp_path / "short")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    long = [("sort a list", "open the file " * 2000), ("read it " * 1000, "in place " * 1500)]
    whole = CrossEncoder(str(folder)).predict(long, activation_fn=torch.nn.Identity())
    seen: list[int] = []
    predict = CrossEncoder.predict

    def watched(model: CrossEncoder, pairs: list[tuple[str, str]], **options: Any) -> Any:
        seen.extend(len(text) for pair in pairs for text in pair)
        return predict(model, pairs, **options)

    monkeypatch.setattr(CrossEncoder, "predict", watched)
    assert by_cross_encoder(folder)(long) == pytest.approx(whole, abs=1e-6)
    assert max(seen) == 24 * 64


def test_a_model_without_a_score_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no cross-encoder: its architecture is LlamaForCausalLM"):
        by_cross_encoder(tiny_folder)
    with pytest.raises(InputError, match="gives 3 scores a pair, not 1"):
        by_cross_encoder(save_cross_encoder(tmp_path / "three", labels=3))
    with pytest.raises(InputError, match=r"--rerank: .*none' cannot be loaded \(.* Give a cross-encoder's folder"):
        by_cross_encoder(tmp_path / "none")


def test_scores_that_depend_on_the_company_are_refused(folder: Path, tmp_path: Path) -> None:
    for value, message in (
        (7, "alone and .* beside a longer one. The padding token"),
        (None, "cannot be loaded .*padding"),
    ):
        copy = save_cross_encoder(tmp_path / str(value))
        config = json.loads((copy / "config.json").read_bytes()) | {"pad_token_id": value}
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            by_cross_encoder(copy)


def test_weights_that_are_missing_broken_or_pickled_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, changed in (
        ("lacking", {key: value for key, value in weights.items() if key != "score.weight"}),
        ("broken", weights | {"score.weight": weights["score.weight"] * float("nan")}),
    ):
        copy = save_cross_encoder(tmp_path / name)
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its files lack score\.weight\. They would be random numbers"):
        by_cross_encoder(tmp_path / "lacking")
    with pytest.raises(InputError, match="gives no finite score for 'sort a list' and"):
        by_cross_encoder(tmp_path / "broken")(PAIRS)
    pickled = save_cross_encoder(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        by_cross_encoder(pickled)


def test_a_special_token_s_name_in_a_text_is_text(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pair = ("sort </s> a list", "</s><s>x")
    with torch.no_grad():
        expected = float(model(**tokenizer(*pair, return_tensors="pt", split_special_tokens=True)).logits)
        other = float(model(**tokenizer(*pair, return_tensors="pt", split_special_tokens=False)).logits)
    assert by_cross_encoder(folder)([pair])[0] == pytest.approx(expected, abs=1e-4)
    assert other != pytest.approx(expected, abs=1e-3)
