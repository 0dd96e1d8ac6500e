"""An embedder as LlamaIndex's ``BaseEmbedding``; of this package only `Embedder.for_llamaindex` imports this file.

LlamaIndex keeps vectors by its models' ``model_name``, so that is the embedder's fingerprint.
"""

import asyncio
from typing import TYPE_CHECKING

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from anchorembed.model.embedder import Embedder

_AT_ONCE = 256  # texts, of which the embedder makes batches of its own


class LlamaIndexEmbedding(BaseEmbedding):
    """Embeds queries with the model's query prompt and nodes with its document prompt."""

    _embedder: "Embedder" = PrivateAttr()

    def __init__(self, embedder: "Embedder") -> None:
        super().__init__(model_name=f"anchorembed-{embedder.fingerprint[:16]}", embed_batch_size=_AT_ONCE)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's records."""
        return "AnchorEmbed"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._embedder.embed_query, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embedder.embed_documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed_documents(texts)
