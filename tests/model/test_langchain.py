"""LangChain's vector stores take an embedder, and embed queries and documents each with their own prompt."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from pages import blocks

TEXTS = ["sort\nthe list", "open the file", "delete a row of the table"]


@pytest.fixture(scope="module")
def embedder(tiny_folder: Path) -> Embedder:
    return Embedder.load(tiny_folder, precision="float32", device="cpu", instruction="Find the text")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("langchain", "langchain_core", "langchain-core"), ("llamaindex", "llama_index", "llama-index-core")],
)
def test_what_is_not_installed_is_named(
    embedder: Embedder, name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"anchorembed.model.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{package}: this package is not installed. .*: pip install {install}$"):
        getattr(embedder, f"for_{name}")()


def test_the_guide_s_code_runs(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_core")
    (code,) = [code for code in blocks("docs/serving.md", "py") if "for_langchain" in code]
    exec(code.replace("MODEL", str(tiny_folder)), {})  # noqa: S102 - the page's own code
    assert capsys.readouterr().out.strip() in ("list.sort() sorts in place.", "The heart pumps blood.")


@pytest.mark.parametrize("form", ["as it is", "for_langchain"])
def test_a_vector_store_finds_by_query_and_document_prompts(embedder: Embedder, form: str) -> None:
    stores = pytest.importorskip("langchain_core.vectorstores")
    store = stores.InMemoryVectorStore(embedder if form == "as it is" else embedder.for_langchain())
    store.add_texts(TEXTS)
    hits = store.similarity_search_with_score("sort a list", k=3)
    expected = embedder.encode(["sort a list"], side="query")[0] @ embedder.encode(TEXTS).T
    assert [hit.page_content for hit, _ in hits] == [TEXTS[row] for row in np.argsort(-expected)]
    assert [score for _, score in hits] == pytest.approx(np.sort(expected)[::-1].tolist(), abs=1e-5)


def test_it_is_an_embeddings_object_also_without_waiting(embedder: Embedder) -> None:
    module = pytest.importorskip("langchain_core.embeddings")
    embeddings = embedder.for_langchain()
    assert isinstance(embeddings, module.Embeddings)
    query = asyncio.run(embeddings.aembed_query("sort a list"))
    assert query == pytest.approx(embedder.encode_query("sort a list").tolist(), abs=1e-6)
    assert query != pytest.approx(embedder.encode_document("sort a list").tolist(), abs=1e-3)
