"""Pairs as a small retrieval test: each query is searched among the positives of all pairs.

It needs no extra, so every training can end with it.

Axes: Q queries, D documents, H hidden size.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from anchorembed.data.pairs import TextPair
from anchorembed.evaluate.ranking import Scorer
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Prompts
from anchorembed.model.vectors import Floats, Side
from anchorembed.system.files import hash_texts

Instruction = tuple[str | None, bool]  # text before queries (None: the model's prompt); is it before documents, too?
METRIC = "nDCG@10"

_DEPTH = 10
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class PairSearch:
    """A retrieval test: texts, each with its instruction, and the rows of each query's relevant documents."""

    queries: list[tuple[Instruction, str]]
    documents: list[tuple[Instruction, str]]
    relevant: list[set[int]]

    @property
    def digest(self) -> str:
        """Hash of all texts, instructions and rows."""
        return hash_texts([json.dumps([self.queries, self.documents, [sorted(rows) for rows in self.relevant]])])


def pair_search(pairs: Iterable[tuple[TextPair, Instruction]]) -> PairSearch:
    """Pairs as a test: each text occurs once, and a query's relevant documents are the positives of all its pairs."""
    queries: dict[tuple[Instruction, str], set[int]] = {}
    documents: dict[tuple[Instruction, str], int] = {}
    for pair, instruction in pairs:
        _, symmetric = instruction
        document_instruction = instruction if symmetric else (None, False)
        row = documents.setdefault((document_instruction, pair.positive), len(documents))
        queries.setdefault((instruction, pair.query), set()).add(row)
    return PairSearch(list(queries), list(documents), list(queries.values()))


def search_by_embedder(test: PairSearch, embedder: Embedder) -> list[float]:
    """nDCG@10 of each query by cosine, [Q]."""
    queries_QH = _embedded(embedder, test.queries, "query")
    documents_HD = _embedded(embedder, test.documents, "document").T
    return _ndcg(test, lambda rows: queries_QH[rows] @ documents_HD)


def search_by_words(test: PairSearch, score: Scorer) -> list[float]:
    """nDCG@10 of each query by a scorer of the documents' texts, such as BM25, [Q]."""
    return _ndcg(test, lambda rows: score([text for _, text in test.queries[rows]]))


def _ndcg(test: PairSearch, score: Callable[[slice], Floats]) -> list[float]:
    size = max(1, _SCORES_AT_ONCE // len(test.documents))
    blocks = (slice(start, start + size) for start in range(0, len(test.queries), size))
    scored = (scores_D for rows in blocks for scores_D in score(rows))
    return [ndcg_at_10(scores_D, relevant) for scores_D, relevant in zip(scored, test.relevant, strict=True)]


def ndcg_at_10(scores_D: Floats, relevant: set[int]) -> float:
    """nDCG@10 of one query; of equal scores, wrong documents rank first; a score of -inf counts as not found."""
    is_right_D = np.isin(np.arange(len(scores_D)), list(relevant))
    best = np.lexsort((is_right_D, -scores_D))[:_DEPTH]
    gains = is_right_D[best] & (scores_D[best] > -np.inf)
    discounts = 1 / np.log2(np.arange(2, _DEPTH + 2))
    return float((gains * discounts[: len(best)]).sum() / discounts[: len(relevant)].sum())


def _embedded(embedder: Embedder, texts: Sequence[tuple[Instruction, str]], side: Side) -> Floats:
    """Unit vectors [N, H] of texts, each with the prompt that training puts before it."""
    return embedder.encode(with_prompts(texts, embedder.metadata.prompts, side), side, "", normalize=True)


def with_prompts(texts: Iterable[tuple[Instruction, str]], prompts: Prompts, side: Side) -> list[str]:
    """Texts after the prompts that training puts before them, to embed with the instruction ``""``."""
    of_pairs = ((prompts.of_pairs(*instruction), text) for instruction, text in texts)
    return [(own.query if side == "query" else own.document) + text for own, text in of_pairs]
