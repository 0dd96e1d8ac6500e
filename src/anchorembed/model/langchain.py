"""An embedder as LangChain's ``Embeddings``; of this package only `Embedder.for_langchain` imports this file."""

from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from anchorembed.model.embedder import Embedder


class LangChainEmbeddings(Embeddings):
    """Embeds queries with the model's query prompt and documents with its document prompt."""

    def __init__(self, embedder: "Embedder") -> None:
        self.embedder = embedder

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return self.embedder.embed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        return self.embedder.embed_documents(texts)
