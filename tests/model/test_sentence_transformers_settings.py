"""An embedder that exists keeps its vectors: ours are sentence-transformers' own, before training and in an export."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing

from anchorembed.errors import InputError
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Prompts, Template
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_file import parse_recipe
from anchorembed.train.run import train
from tiny import recipe_values, tiny_model, tiny_tokenizer, write_pairs

TEXTS = ["sort", "", "open a file and read it", "sort the list " * 40, "文字 списки 🙂"]
SEARCH = "Instruct: Given a query, find passages\nQuery:"
BOS, EOS = ("<s>", "</s>")


def save_existing(
    folder: Path,
    kind: str = "qwen3",
    *,
    around: str = "$A </s>",
    prompts: dict[str, str] | None = None,
    pooling: str = "lasttoken",
    after: tuple[object, ...] = (Normalize(),),
) -> Path:
    """Write an embedder as sentence-transformers does, from a model without its output head."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    )
    tokenizer.pad_token, tokenizer.padding_side = EOS, "left"
    base = folder.parent / f"{folder.name}-base"
    tiny_model(kind).base_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    modules = [Transformer(str(base), max_seq_length=64), Pooling(32, pooling), *after]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder), create_model_card=False)
    return folder


def older_files(folder: Path) -> None:
    """Write modules and pooling as sentence-transformers did before version 6."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rsplit('.', 1)[-1]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    modes = {"cls_token": False, "mean_tokens": False, "lasttoken": True}
    record = {"word_embedding_dimension": 32} | {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(record))


def qwen_like(folder: Path) -> Path:
    return save_existing(folder, "llama", prompts={"query": SEARCH, "document": ""})


def e5_like(folder: Path) -> Path:
    return save_existing(folder, "mistral", around="<s> $A </s>", prompts={"web_search_query": SEARCH})


def older(folder: Path) -> Path:
    save_existing(folder, "qwen3", prompts={"query": "query: ", "document": "passage: "}, after=())
    older_files(folder)
    return folder


KINDS = {"qwen-like": qwen_like, "e5-like": e5_like, "older": older}
EXPECTED = {
    "qwen-like": (Template("", "", "", EOS), Prompts(SEARCH, ""), True),
    "e5-like": (Template(BOS, "", "", EOS), Prompts("", ""), True),
    "older": (Template("", "", "", EOS), Prompts("query: ", "passage: "), False),
}


def assert_same_vectors(embedder: Embedder, folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(embedder.encode(TEXTS, "query"), model.encode_query(TEXTS), atol=1e-4)
    np.testing.assert_allclose(embedder.encode(TEXTS), model.encode_document(TEXTS), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_its_vectors_are_those_of_sentence_transformers(kind: str, tmp_path: Path, said: list[str]) -> None:
    folder = KINDS[kind](tmp_path / "model")
    embedder = Embedder.load(folder, precision="float32")
    metadata = embedder.metadata
    assert (metadata.template, metadata.prompts, metadata.normalize) == EXPECTED[kind]
    assert metadata.lengths == Lengths(64, 64)
    assert_same_vectors(embedder, folder)
    assert any("web_search_query" in line for line in said) == (kind == "e5-like")
    assert any("without its output head" in line for line in said) == (kind != "qwen-like"), "llama's head is tied"
    export(folder, tmp_path / "out")
    assert_same_vectors(embedder, tmp_path / "out")
    again = Embedder.load(tmp_path / "out", precision="float32")
    assert again.fingerprint == embedder.fingerprint


def test_each_side_has_the_limit_that_the_folder_gives_it(tmp_path: Path) -> None:
    file = qwen_like(tmp_path / "model") / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"query_length": 48, "document_length": 96}))
    embedder = Embedder.load(tmp_path / "model", precision="float32")
    assert embedder.metadata.lengths == Lengths(48, 96)
    assert_same_vectors(embedder, tmp_path / "model")


def test_an_instruction_stands_instead_of_its_query_prompt(tmp_path: Path) -> None:
    embedder = Embedder.load(older(tmp_path / "model"), precision="float32", instruction="find")
    assert embedder.metadata.prompts == Prompts("Instruct: find\nQuery: ", "passage: ")


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_train_it_and_keep_what_is_its_own(kind: str, tmp_path: Path, said: list[str]) -> None:
    folder = KINDS[kind](tmp_path / "model")
    values = recipe_values(write_pairs(tmp_path / "p.jsonl"), folder, tmp_path / "out")
    values["data"] |= {"query_tokens": 56, "document_tokens": 48}
    schedule = {"steps": 2, "batch_size": 8, "warmup_steps": 0, "evaluate_every": 0}
    values |= {"reconstruct": schedule, "contrast": schedule}
    recipe = parse_recipe(values)
    train(recipe)
    assert any("its own limit is 64 tokens" in line for line in said)
    trained = Embedder.load(tmp_path / "out" / "contrast" / "model")
    template, prompts, normalize = EXPECTED[kind]
    assert (trained.metadata.template, trained.metadata.prompts) == (template, prompts)
    assert trained.metadata.normalize == normalize
    assert trained.metadata.lengths == Lengths(56, 48)
    before, after = (model.encode(TEXTS) for model in (Embedder.load(folder), trained))
    assert np.abs(before - after).max() > 1e-4


def bidirectional(folder: Path) -> Path:
    save_existing(folder, "gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    return folder


def damaged(folder: Path) -> Path:
    save_existing(folder)
    (folder / "modules.json").write_text("[")
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mean": (lambda folder: save_existing(folder, pooling="mean"), "pools by mean"),
    "cls": (lambda folder: save_existing(folder, pooling="cls"), "pools by cls"),
    "dense": (lambda folder: save_existing(folder, after=(Dense(32, 16),)), "has a module Dense"),
    "no end": (lambda folder: save_existing(folder, around="<s> $A"), "no end token after a text"),
    "bidirectional": (bidirectional, "is bidirectional"),
    "damaged": (damaged, r"modules\.json: damaged"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_pools_otherwise_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    make, message = REFUSED[fault]
    with pytest.raises(InputError, match=message):
        Embedder.load(make(tmp_path / "model"))


def test_a_template_may_be_named_instead(tmp_path: Path) -> None:
    folder = save_existing(tmp_path / "model", around="<s> $A")
    template = Template(BOS, "", "", EOS)
    assert Embedder.load(folder, template=template).metadata.template == template
