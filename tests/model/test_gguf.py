"""A GGUF file gives its model in float32 and its tokenizer with the ids and special tokens it has in the file."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import load_model, load_tokenizer
from anchorembed.model.metadata import GGUF_KEY, METADATA
from anchorembed.model.tokens import Lengths
from tiny import DATA, SIZES, tiny_model, tiny_tokenizer

BOS, EOS = "<s>", "</s>"
QUANTISED = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = len(tiny_tokenizer())
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model(vocabulary=tokens))


def write_gguf(path: Path, model: PreTrainedModel, without: str = "", rope: str = "", **texts: str) -> Path:
    """Write a tiny Llama as a GGUF file with the tests' byte-level tokenizer.

    It lacks the weight ``without``; ``rope`` is the type of its rotary scaling, or the name of a tensor of factors;
    ``texts`` are further ones, by key.
    """
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    if rope.endswith(".weight"):
        writer.add_tensor(rope, np.full(config.head_dim // 2, 8.0, np.float32))
    elif rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    for key, text in texts.items():
        writer.add_string(key, text)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in (BOS, EOS) else 1 for token in tokens])
    merges = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    for name, weight in model.state_dict().items():
        if name not in ("lm_head.weight", without):  # the head is tied
            stored = _as_stored(name, weight)
            kind = QUANTISED if name.endswith("gate_proj.weight") else gguf.GGMLQuantizationType.F32
            writer.add_tensor(_renamed(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _as_stored(name: str, weight: torch.Tensor) -> np.ndarray:
    """Queries and keys are stored with the two halves of a head, which rotary positions pair, interleaved."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        half = SIZES["head_dim"] // 2
        weight = weight.reshape(-1, 2, half, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def test_the_model_is_the_one_that_was_stored(file: Path) -> None:
    model, _ = load_model(str(file))
    expected = tiny_model(vocabulary=model.config.vocab_size).state_dict()
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == dict.fromkeys(expected, torch.float32)
    for name, weight in model.state_dict().items():
        rounding = 0.01 if name.endswith("gate_proj.weight") else 0.0  # it is stored in 8 bits
        torch.testing.assert_close(weight, expected[name], rtol=0.0, atol=rounding, msg=name)


def test_the_tokenizer_is_the_one_that_was_stored(file: Path) -> None:
    tokenizer, expected = load_tokenizer(str(file)), tiny_tokenizer()
    for text in ("sort a list", "", "  two  spaces", "文字 42\n"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"], text
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)


def test_it_embeds(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    vectors = Embedder.load(file, precision="float32").encode(["sort a list", "open a file"])
    assert vectors.shape == (2, 32)
    assert np.isfinite(vectors).all()
    assert capfd.readouterr() == ("", ""), "no bar of a library"


def test_its_header_is_read_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside transformers, which reads it for itself."""
    reads, reader = [], gguf.GGUFReader

    def counted(path: Path) -> gguf.GGUFReader:
        reads.append(sys._getframe(1).f_globals["__name__"])
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    model = tiny_model(vocabulary=len(tiny_tokenizer()))
    for number, text in enumerate(("", "{"), start=1):
        file = write_gguf(tmp_path / "x.gguf", model, **({GGUF_KEY: text} if text else {}))
        with pytest.raises(InputError, match="damaged") if text else nullcontext():
            Embedder.load(file)
        assert reads.count("anchorembed.model.gguf") == number


def test_a_file_that_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    model, missing = tiny_model(vocabulary=len(tiny_tokenizer())), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"its files lack {missing}"):
        load_model(str(write_gguf(tmp_path / "part.gguf", model, without=missing)))
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        load_model(str(write_gguf(tmp_path / "nan.gguf", model)))


@pytest.mark.parametrize("rope", ["linear", "yarn", "rope_freqs.weight", "rope_factors_long.weight", "none"])
def test_scaled_positions_that_transformers_does_not_read_are_refused(tmp_path: Path, rope: str) -> None:
    file = write_gguf(tmp_path / "scaled.gguf", tiny_model(vocabulary=len(tiny_tokenizer())), rope=rope)
    if rope == "none":
        load_model(str(file))
        return
    with pytest.raises(InputError, match=rf"rotary positions are scaled \(.*{rope}.*Use the model's safetensors"):
        load_model(str(file))


@pytest.mark.parametrize("rules", ["smollm", "gpt-2"])
def test_rules_of_splitting_that_transformers_does_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rules: str
) -> None:
    model = tiny_model(vocabulary=len(tiny_tokenizer()))
    load_model(str(write_gguf(tmp_path / "x.gguf", model, **{"tokenizer.ggml.pre": rules})))
    assert ("the file's 'smollm' may differ" in caplog.text) == (rules == "smollm")


def test_metadata_are_read_from_the_file_wherever_it_lies(tiny_folder: Path, tmp_path: Path) -> None:
    own = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(48, 64), instruction="find")
    own.save(tmp_path / "saved")
    record = (tmp_path / "saved" / METADATA).read_text(encoding="utf-8")
    model = tiny_model(vocabulary=len(tiny_tokenizer()))
    file = write_gguf(tmp_path / "any name.gguf", model, **{GGUF_KEY: record})
    assert Embedder.load(file, precision="float32").metadata == own.metadata
    with pytest.raises(InputError, match=r"damaged\.gguf: damaged .*Export or train the model again"):
        Embedder.load(write_gguf(tmp_path / "damaged.gguf", model, **{GGUF_KEY: record[:-9]}))
