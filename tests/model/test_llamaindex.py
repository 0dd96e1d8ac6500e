"""LlamaIndex takes an embedder as its embedding model, for an index and for its queries, each with their own prompt."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from anchorembed.model.embedder import Embedder
from pages import blocks

core = pytest.importorskip("llama_index.core")

TEXTS = ["sort\nthe list", "open the file", "delete a row of the table"]


@pytest.fixture(scope="module")
def embedder(tiny_folder: Path) -> Embedder:
    return Embedder.load(tiny_folder, precision="float32", device="cpu", instruction="Find the text")


def test_an_index_finds_by_query_and_document_prompts(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.Settings, "_embed_model", None)
    core.Settings.embed_model = embedder.for_llamaindex()
    nodes = [core.schema.TextNode(text=text) for text in TEXTS]
    found = core.VectorStoreIndex(nodes).as_retriever(similarity_top_k=3).retrieve("sort a list")
    expected = embedder.encode(["sort a list"], side="query")[0] @ embedder.encode(TEXTS).T
    assert [node.text for node in found] == [TEXTS[row] for row in np.argsort(-expected)]
    assert [node.score for node in found] == pytest.approx(np.sort(expected)[::-1].tolist(), abs=1e-5)


def test_one_text_and_waiting_for_none_give_the_same(embedder: Embedder) -> None:
    model = embedder.for_llamaindex()
    query = embedder.encode_query("sort a list").tolist()
    assert model.get_query_embedding("sort a list") == pytest.approx(query, abs=1e-6)
    assert asyncio.run(model.aget_query_embedding("sort a list")) == pytest.approx(query, abs=1e-6)
    document = embedder.encode_document(TEXTS[0]).tolist()
    assert model.get_text_embedding(TEXTS[0]) == pytest.approx(document, abs=1e-6)
    assert query != pytest.approx(document, abs=1e-3)


def test_its_name_tells_models_apart(embedder: Embedder, tiny_folder: Path) -> None:
    """LlamaIndex reuses vectors of a model by its record."""
    other = Embedder.load(tiny_folder, precision="float32", device="cpu")
    names = {model.for_llamaindex().to_dict()["model_name"] for model in (embedder, other)}
    assert len(names) == 2


def test_the_guide_s_code_runs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(core.Settings, "_embed_model", None)
    (code,) = [code for code in blocks("docs/serving.md", "py") if "for_llamaindex" in code]
    exec(code.replace("MODEL", str(tiny_folder)), {})  # noqa: S102 - the page's own code
    assert capsys.readouterr().out.strip() in ("list.sort() sorts in place.", "Blood.")
