"""Stage II as a training step: a step's pairs in, the gradient of one InfoNCE over all of them out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch, pack, send
from anchorembed.model.tokens import TokenPair
from anchorembed.system.processes import gathered, processes, rank, shares
from anchorembed.train.gradcache import cached_backward
from anchorembed.train.info_nce import (
    Candidates,
    candidates,
    distillation,
    false_negatives,
    info_nce,
    matryoshka,
    similarities,
    too_similar,
)
from anchorembed.train.stage import Measured, Metrics, by_length, read_back


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a step compares: texts are counted, and documents left out, before anything is embedded.

    ``queries`` is Q; documents are positives, then hard negatives. ``excluded_QD`` marks what is no negative of what.
    """

    queries: int
    excluded_QD: Tensor
    positives_Q: Tensor
    given: Candidates | None


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """A step's texts on the device: this process's chunks, and how all processes' rows make up the comparison.

    The chunks' embeddings, in the order of ``rows``, are this process's; those of all, in the order of ``order``, are
    queries, positives and negatives.
    """

    comparison: Comparison
    chunks: list[PackedBatch]
    rows: Tensor
    counts: list[int]
    order: Tensor
    own_pairs: Sequence[TokenPair]


@dataclass(frozen=True, slots=True)
class Contrastive:
    """Stage II on a step's pairs: one InfoNCE over all of them, whatever the token budget and the processes."""

    module: nn.Module
    device: torch.device
    scale: float
    hard_negatives: int
    budget: int
    mask_above: float | None = None
    guide: Embedder | None = None
    distill: float = 0.0
    dimensions: tuple[int, ...] = ()
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self, number: int, pairs: Sequence[TokenPair]) -> Metrics:
        """Accumulate the gradient of L_II over the pairs, by GradCache if they exceed the token budget."""
        return read_back(self.run(self.prepare(number, pairs)))

    def prepare(self, number: int, pairs: Sequence[TokenPair]) -> ContrastiveBatch:
        """Lay out a step and send it to the device."""
        shared = shares(pairs)
        parts = [_texts(part, self.hard_negatives) for part in shared]
        kinds = [kind for part in parts for kind, texts in enumerate(part) for _ in texts]
        order = torch.tensor(sorted(range(len(kinds)), key=lambda row: kinds[row]))
        chunks, rows = zip(*(self._chunks([text for texts in part for text in texts]) for part in parts), strict=True)
        # Sharded weights are gathered in each forward, so all processes must do equally many: some for nothing.
        idle = [pack([pairs[0].query]) for _ in range(max(map(len, chunks)) - len(chunks[rank()]))]
        return ContrastiveBatch(
            self._comparison(pairs),
            [chunk.to(self.device) for chunk in chunks[rank()] + idle],
            send(rows[rank()], self.device),
            [sum(map(len, part)) for part in parts],
            send(order, self.device),
            shared[rank()],
        )

    def run(self, batch: ContrastiveBatch) -> Measured:
        """Backpropagate a step's chunks; returns the loss over all processes' texts."""
        guided = self._guided(batch.own_pairs)
        guided = None if guided is None else gathered(guided, batch.counts)[batch.order]

        def loss(embeddings: Tensor) -> Tensor:
            own = embeddings[batch.rows]
            nothing = 0.0 * embeddings[len(own) :].sum()
            return self._loss(batch.comparison, gathered(own, batch.counts)[batch.order], guided) + nothing

        return {"loss": cached_backward(self._embed, batch.chunks, loss, self.device, processes(), self.unsynced)}

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss on held-out pairs, each the others' negatives; accuracy is the share that finds its own first."""
        comparison = self._comparison(pairs)
        sequences = [text for texts in _texts(pairs, self.hard_negatives) for text in texts]
        chunks, rows = self._chunks(sequences)
        embeddings = torch.cat([self._embed(chunk.to(self.device)) for chunk in chunks])[send(rows, self.device)]
        scores_QD = similarities(embeddings[: len(pairs)], embeddings[len(pairs) :])
        right = scores_QD.masked_fill(comparison.excluded_QD, float("-inf")).argmax(dim=1) == comparison.positives_Q
        loss = self._loss(comparison, embeddings, self._guided(pairs))
        return read_back({"held_out_loss": loss, "held_out_accuracy": right.float().mean()})

    def _comparison(self, pairs: Sequence[TokenPair]) -> Comparison:
        queries, positives, negatives = _texts(pairs, self.hard_negatives)
        documents = positives + negatives
        rows = list(range(len(pairs)))
        excluded_QD = false_negatives([*map(tuple, queries)], [*map(tuple, documents)], rows)
        given = candidates(*_scored(pairs, self.hard_negatives)).to(self.device) if self.distill else None
        return Comparison(len(pairs), send(excluded_QD, self.device), send(torch.tensor(rows), self.device), given)

    def _loss(self, comparison: Comparison, embeddings: Tensor, guided: Tensor | None) -> Tensor:
        """L_II of all embeddings: queries, positives, negatives; ``guided`` are the guide's of the same texts."""
        count, positives_Q, left_out_QD = comparison.queries, comparison.positives_Q, comparison.excluded_QD
        if self.mask_above is not None:
            judging = embeddings if guided is None else guided
            left_out_QD = left_out_QD | too_similar(judging[:count], judging[count:], positives_Q, self.mask_above)

        def compared(queries_QH: Tensor, documents_DH: Tensor) -> Tensor:
            value = info_nce(queries_QH, documents_DH, positives_Q, self.scale, left_out_QD)
            if comparison.given is not None:
                value = value + self.distill * distillation(queries_QH, documents_DH, comparison.given, self.scale)
            return value

        every = dict.fromkeys((*self.dimensions, embeddings.shape[1]))
        return matryoshka(compared, embeddings[:count], embeddings[count:], tuple(every))

    def _guided(self, pairs: Sequence[TokenPair]) -> Tensor | None:
        """The guide's vectors of queries, positives and negatives, in that order, if there is a guide."""
        if self.guide is None:
            return None
        negatives = [text for pair in pairs for text in pair.text.negatives[: self.hard_negatives]]
        queries = self.guide.encode([pair.text.query for pair in pairs], "query")
        documents = self.guide.encode([*(pair.text.positive for pair in pairs), *negatives])
        return torch.cat([torch.from_numpy(queries), torch.from_numpy(documents)]).to(self.device)

    def _chunks(self, sequences: Sequence[list[int]]) -> tuple[list[PackedBatch], Tensor]:
        """Sequences in chunks within the budget, and the row of each among the chunks' embeddings; on the CPU."""
        order, runs = by_length([len(sequence) for sequence in sequences], self.budget)
        chunks = [pack([sequences[i] for i in order[run.start : run.stop]]) for run in runs]
        return chunks, torch.tensor(order, dtype=torch.long).argsort()

    def _embed(self, batch: PackedBatch) -> Tensor:
        embeddings: Tensor = self.module(batch)
        return embeddings


def _texts(pairs: Sequence[TokenPair], hard_negatives: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Templated queries, positives and hard negatives of pairs."""
    negatives = [negative for pair in pairs for negative in pair.negatives[:hard_negatives]]
    return [pair.query for pair in pairs], [pair.document for pair in pairs], negatives


def _scored(pairs: Sequence[TokenPair], hard_negatives: int) -> tuple[list[list[int]], list[list[float]]]:
    """Of each pair, the documents that have given scores, as `_texts` orders them, and the scores."""
    candidates: list[list[int]] = []
    given: list[list[float]] = []
    free = len(pairs)
    for row, pair in enumerate(pairs):
        count = len(pair.negatives[:hard_negatives])
        has = bool(pair.text.scores)
        candidates.append([row, *range(free, free + count)] if has else [])
        given.append(list(pair.text.scores[: 1 + count]))
        free += count
    return candidates, given
