"""Exported = native: sentence-transformers gives our vectors for both sides, whatever the text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from anchorembed.errors import InputError
from anchorembed.export import folder as exporting
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import saved_sha256
from anchorembed.model.tokens import Lengths
from tiny import save_tiny

TEXTS = ["sort", "", "  ", "sort the list " * 80, "文字 списки", "open a file", "sort</s> and <s>", "</s>"]


@pytest.fixture(params=["llama", "llama-untied"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "base", request.param)
    embedder = Embedder.load(folder, precision="float32", lengths=Lengths(48, 48), instruction="find code")
    embedder.save(tmp_path / "trained")
    return tmp_path / "trained"


def test_exported_equals_native(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    smallest = export(trained, tmp_path / "out")
    assert capfd.readouterr() == ("", ""), "no bar or warning of a library"
    assert smallest > 0.9999
    native = Embedder.load(trained, precision="float32")
    exported = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(exported.encode_query(TEXTS), native.encode(TEXTS, side="query"), atol=1e-4)
    np.testing.assert_allclose(exported.encode_document(TEXTS), native.encode(TEXTS, side="document"), atol=1e-4)
    assert exported.prompts == {"query": "Instruct: find code\nQuery: ", "document": ""}
    again = Embedder.load(tmp_path / "out", precision="float32")
    np.testing.assert_allclose(again.encode(TEXTS, side="query"), native.encode(TEXTS, side="query"), atol=1e-4)
    assert again.fingerprint == native.fingerprint
    assert np.abs(exported.encode_query(TEXTS) - exported.encode_document(TEXTS)).max() > 1e-2


def test_the_exported_tokenizer_keeps_no_cut_and_no_padding(trained: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(trained, precision="float32")
    embedder.tokenizer(TEXTS, truncation=True, max_length=7, padding=True)
    embedder.save(tmp_path / "saved")
    export(trained, tmp_path / "out")
    for folder in (tmp_path / "saved", tmp_path / "out"):
        rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert (rules["truncation"], rules["padding"]) == (None, None)


def test_an_export_that_differs_is_not_kept(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "asdict", lambda prompts: {"query": "Another: ", "document": ""})
    with pytest.raises(InputError, match="differs from the model"):
        export(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(trained, tmp_path / "out")


@pytest.mark.parametrize("lengths", [Lengths(40, 48), Lengths(48, 40)])
def test_one_limit_cuts_both_sides(lengths: Lengths, tmp_path: Path, said: list[str]) -> None:
    model = Embedder.load(save_tiny(tmp_path / "base"), precision="float32", lengths=lengths)
    model.save(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "out")
    assert len([message for message in said if "queries at" in message]) == 1
    again = Embedder.load(tmp_path / "out", precision="float32")
    assert again.metadata.lengths == Lengths(48, 48)
    exported = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(exported.encode_query(TEXTS), again.encode(TEXTS, side="query"), atol=1e-4)
    np.testing.assert_allclose(exported.encode_document(TEXTS), again.encode(TEXTS), atol=1e-4)


def test_bfloat16_weights(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    smallest = export(trained, tmp_path / "out", dtype="bfloat16")
    assert capfd.readouterr() == ("", ""), "no bar or warning of a library"
    assert 0.99 < smallest < 0.99999
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    again = Embedder.load(tmp_path / "out", precision="float32")
    assert saved_sha256(tmp_path / "out") == again.weights_sha256


def test_what_servers_read(trained: Path, tmp_path: Path) -> None:
    """text-embeddings-inference 1.9 needs each of these keys to start, as numbers and truths, never null."""
    export(trained, tmp_path / "out")
    settings = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*.json")}
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    assert settings["sentence_bert_config.json"]["max_seq_length"] == 48
    assert (pooling["pooling_mode_cls_token"], pooling["pooling_mode_mean_tokens"]) == (False, False)
    assert pooling["pooling_mode_lasttoken"] is True
    config = settings["config.json"]
    end = Embedder.load(trained).pairs.end_id
    assert (config["eos_token_id"], config["pad_token_id"], config["rope_theta"]) == (end, end, 10000.0)
    assert settings["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {module["type"].rsplit(".", 1)[0] for module in settings["modules.json"]} == {"sentence_transformers.models"}
