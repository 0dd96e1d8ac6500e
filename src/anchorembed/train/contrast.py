"""Stage II: contrastive learning, one InfoNCE over all pairs of a step, whatever the token budget and the processes.

``make_batch`` counts texts, marks false negatives and packs chunks on the CPU. ``run`` embeds the chunks
(`gradcache`), gathers all processes' embeddings and compares them (`contrastive_losses`).

Axes: N texts, Q queries, D documents (positives first, then hard negatives), H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import load_tokenizer
from anchorembed.model.metadata import find_metadata
from anchorembed.model.packing import PackedBatch, by_length, pack, send
from anchorembed.model.sentence_transformers_settings import find_embedder_settings
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Contrast, Data
from anchorembed.system.device import Precision
from anchorembed.system.processes import gathered, processes, rank, shares
from anchorembed.train.contrastive_losses import (
    ScoredDocuments,
    distillation,
    equal,
    false_negatives,
    has_negatives,
    info_nce,
    matryoshka,
    scored_documents,
    similarities,
    too_similar,
)
from anchorembed.train.flops import FORWARD, flops_a_weight, weight_count
from anchorembed.train.gradcache import GradCache
from anchorembed.train.memory_estimate import shape_of_model
from anchorembed.train.prepare import Prepared
from anchorembed.train.stage import Measured, Metrics, Stage, StepSize, add_adapters, read_back


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """A step's texts on the device: this process's chunks, and which rows of all processes the loss compares.

    Attributes:
        excluded_QD: documents of all processes that must not be a query's negatives.
        given: scores to distill, if there are any.
        chunks: this process's texts, long ones first; the last ones may be idle.
        chunk_rows: row of each text of this process among the chunks' embeddings.
        counts: texts of each process.
        gathered_rows: rows of all queries, then positives, then negatives among the gathered embeddings.
        pairs: this process's pairs, for the guide.
    """

    excluded_QD: Tensor
    given: ScoredDocuments | None
    chunks: list[PackedBatch]
    chunk_rows: Tensor
    counts: list[int]
    gathered_rows: Tensor
    pairs: Sequence[TokenPair]


@dataclass(frozen=True)
class Contrastive(Stage):
    """Stage II on a step's pairs, by GradCache if they exceed the token budget.

    ``guide`` is the model whose vectors decide ``settings.mask_above``.
    """

    settings: Contrast
    guide: Embedder | None = None

    name: ClassVar[str] = "contrast"
    adapters_cure: ClassVar[str] = (
        "contrast.lora is null: all weights train, which need float32. Leave lora=null out, or set "
        "model.weights=float32."
    )

    @property
    def hard_negatives(self) -> int:
        """Hard negatives of each pair that a step uses."""
        return self.settings.hard_negatives

    # Building

    @classmethod
    def build(cls, embedder: Embedder, settings: Contrast, budget: int) -> Self:
        """Build the stage as `Stage.build` does, with its guide."""
        return replace(super().build(embedder, settings, budget), guide=_guide(embedder, settings))

    @staticmethod
    def trained_module(embedder: Embedder, settings: Contrast) -> nn.Module:
        """The embedder with adapters; the output head is frozen, but for a weight that is the embedding."""
        embedder.backbone.freeze_head()
        add_adapters(embedder.backbone, settings.lora)
        return embedder

    @staticmethod
    def step_size(settings: Contrast, data: Data) -> StepSize:
        """Sizes of a step of the longest texts, and of all similarities."""
        queries, documents = settings.batch_size, settings.batch_size * (1 + settings.hard_negatives)
        return StepSize(
            longest=max(data.query_tokens, data.document_tokens),
            most=queries * data.query_tokens + documents * data.document_tokens,
            queries=queries,
            documents=documents,
            lora=settings.lora,
        )

    @classmethod
    def check(cls, settings: Contrast, prepared: Prepared) -> None:
        """Refuse settings that cannot work with these pairs and this model.

        Raises:
            InputError: naming the first such setting.
        """
        super().check(settings, prepared)
        if settings.batch_size == 1 and not min(settings.hard_negatives, prepared.store.most_negatives):
            raise InputError(
                "contrast.batch_size: 1, which leaves a query no negative, as no hard negatives are used. Set it to 2 "
                "or more, or train on pairs with hard negatives."
            )
        if settings.distill and not prepared.store.scored:
            raise InputError('contrast.distill: no pair has given scores. Add a column "scores", or leave distill out.')
        dimension = prepared.embedder.dimension
        if max(settings.dimensions, default=0) > dimension:
            raise InputError(
                f"contrast.dimensions: {max(settings.dimensions)} is above {dimension}, the model's. Lower it."
            )
        if settings.guide is not None:
            shape_of_model(settings.guide)  # so that a wrong one is refused before Stage I
            load_tokenizer(settings.guide)
            if find_metadata(settings.guide) is None:
                find_embedder_settings(settings.guide)

    @staticmethod
    def teaches(settings: Contrast, pairs: Sequence[TokenPair]) -> bool:
        """Whether any query has a negative, without which the loss is 0."""
        return has_negatives(excluded_documents(pairs, settings.hard_negatives))

    # A step

    def make_batch(self, number: int, pairs: Sequence[TokenPair]) -> ContrastiveBatch:
        """Lay out a step and send it to the device."""
        shared = shares(pairs)
        parts = [_texts(part, self.hard_negatives) for part in shared]
        roles = [role for part in parts for role, texts in enumerate(part) for _ in texts]  # query, positive, negative
        gathered_rows = torch.tensor(sorted(range(len(roles)), key=lambda row: roles[row]))
        chunks, rows = zip(*(self._chunks([text for texts in part for text in texts]) for part in parts), strict=True)
        # Sharded weights are gathered in each forward pass, so all processes must do equally many: some are idle.
        idle = [pack([pairs[0].query]) for _ in range(max(map(len, chunks)) - len(chunks[rank()]))]
        return ContrastiveBatch(
            *self._loss_inputs(pairs),
            [chunk.to(self.device) for chunk in chunks[rank()] + idle],
            send(rows[rank()], self.device),
            [sum(map(len, part)) for part in parts],
            send(gathered_rows, self.device),
            shared[rank()],
        )

    def run(self, batch: ContrastiveBatch) -> Measured:
        """Backpropagate a step's chunks; returns the loss over all processes' texts."""
        guided = self._guided(batch.pairs)
        guided = None if guided is None else gathered(guided, batch.counts)[batch.gathered_rows]
        cache = GradCache(self.module, batch.chunks, self.device)
        of_process = cache.vectors_NH[batch.chunk_rows]
        embeddings = gathered(of_process, batch.counts)[batch.gathered_rows]
        idle = 0.0 * cache.vectors_NH[len(of_process) :].sum()  # keeps idle chunks in the graph
        loss = self._loss(batch.excluded_QD, batch.given, embeddings, guided) + idle
        cache.backward(processes() * loss, self.unsynced)
        return {"loss": loss.detach()}

    # Held-out pairs

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss on held-out pairs as one batch; accuracy is the share of queries whose positive ranks first."""
        excluded_QD, given = self._loss_inputs(pairs)
        sequences = [text for texts in _texts(pairs, self.hard_negatives) for text in texts]
        chunks, rows = self._chunks(sequences)
        embeddings = torch.cat([self.module(chunk.to(self.device)) for chunk in chunks])[send(rows, self.device)]
        scores_QD = similarities(embeddings[: len(pairs)], embeddings[len(pairs) :])
        best_Q = scores_QD.masked_fill(excluded_QD, float("-inf")).argmax(dim=1)
        is_right_Q = best_Q == torch.arange(len(pairs), device=self.device)
        loss = self._loss(excluded_QD, given, embeddings, self._guided(pairs))
        return read_back({"held_out_loss": loss, "held_out_accuracy": is_right_Q.float().mean()})

    def _loss_inputs(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, ScoredDocuments | None]:
        """Documents that must not be a query's negatives, and scores to distill, on the device."""
        excluded_QD, given = excluded_documents(pairs, self.hard_negatives), None
        if self.settings.distill:
            given = scored_documents(*_given_scores(pairs, self.hard_negatives)).to(self.device)
        return send(excluded_QD, self.device), given

    def _loss(
        self, excluded_QD: Tensor, given: ScoredDocuments | None, embeddings: Tensor, guided: Tensor | None
    ) -> Tensor:
        """L_II of all embeddings: queries, positives, negatives; ``guided`` are the guide's of the same texts."""
        count = len(excluded_QD)
        margin, distill, scale = self.settings.mask_above, self.settings.distill, self.settings.scale
        if margin is not None:
            vectors = embeddings if guided is None else guided
            excluded_QD = excluded_QD | too_similar(vectors[:count], vectors[count:], margin)

        def loss(vectors: Tensor) -> Tensor:
            queries_QH, documents_DH = vectors[:count], vectors[count:]
            value = info_nce(queries_QH, documents_DH, scale, excluded_QD)
            if given is not None:
                value = value + distill * distillation(queries_QH, documents_DH, given, scale)
            return value

        return matryoshka(loss, embeddings, self.settings.dimensions)

    def _guided(self, pairs: Sequence[TokenPair]) -> Tensor | None:
        """The guide's vectors of queries, positives and negatives, in that order, if there is a guide."""
        if self.guide is None:
            return None
        queries = self.guide.encode([pair.text.query for pair in pairs], "query")
        documents = self.guide.encode(_document_texts(pairs, self.hard_negatives))
        return torch.cat([torch.from_numpy(queries), torch.from_numpy(documents)]).to(self.device)

    def _chunks(self, sequences: Sequence[list[int]]) -> tuple[list[PackedBatch], Tensor]:
        """Sequences in chunks within the budget, and the row of each among the chunks' embeddings; on the CPU."""
        order, runs = by_length([len(sequence) for sequence in sequences], self.budget)
        chunks = [pack([sequences[i] for i in order[run.start : run.stop]]) for run in runs]
        return chunks, torch.tensor(order, dtype=torch.long).argsort()

    def quality(self, metrics: Metrics) -> float | None:
        """The share of held-out queries whose positive ranks first."""
        return metrics.get("held_out_accuracy")

    # Cost and warnings

    def flops(self, number: int, pairs: Sequence[TokenPair]) -> float:
        """Model FLOPs of a step: each text is embedded once, and by a guide, as if that had the same tokens."""
        backbone = self.embedder.backbone
        encoded = sum(len(text) for texts in _texts(pairs, self.hard_negatives) for text in texts)
        guide = FORWARD * weight_count(self.guide.backbone) if self.guide else 0
        return float((flops_a_weight(backbone) * weight_count(backbone) + guide) * encoded)

    def unused(self, prepared: Prepared) -> list[str]:
        """Warnings of unused hard negatives, and of modules without adapters."""
        sentences, most, used = super().unused(prepared), prepared.store.most_negatives, self.hard_negatives
        if most > used:
            sentences.append(f"of up to {most} hard negatives a pair, {used} used: contrast.hard_negatives")
        return sentences


def _guide(embedder: Embedder, settings: Contrast) -> Embedder | None:
    """The model that decides which documents are negatives, on the embedder's device."""
    if settings.guide is None:
        return None
    precision: Precision = "float32" if embedder.dtype == torch.float32 else "bfloat16"
    device = embedder.device.type if processes() > 1 else str(embedder.device)  # of several, each has its own GPU
    guide = Embedder.load(settings.guide, precision=precision, device=device)
    guide.requires_grad_(False)
    return guide


def excluded_documents(pairs: Sequence[TokenPair], hard_negatives: int) -> Tensor:
    """Mark, [Q, D], documents that must not be negatives of a query because they answer it or are the query itself.

    Token ids are compared, as texts that are equal once cut are one text to the model. A query and a document are also
    compared as texts: their instructions may differ, and so may their limits.
    """
    queries, positives, negatives = _texts(pairs, hard_negatives)
    excluded_QD = false_negatives([*map(tuple, queries)], [*map(tuple, positives + negatives)])
    is_query_QD = equal([pair.text.query for pair in pairs], _document_texts(pairs, hard_negatives))
    return (excluded_QD | is_query_QD).fill_diagonal_(False)


def _texts(pairs: Sequence[TokenPair], hard_negatives: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Templated queries, positives and hard negatives of pairs."""
    negatives = [negative for pair in pairs for negative in pair.negatives[:hard_negatives]]
    return [pair.query for pair in pairs], [pair.document for pair in pairs], negatives


def _document_texts(pairs: Sequence[TokenPair], hard_negatives: int) -> list[str]:
    """Positives and hard negatives of pairs before tokenising, of those that `_texts` has and in its order."""
    used = [pair.text.negatives[: len(pair.negatives[:hard_negatives])] for pair in pairs]
    negatives = [text for texts in used for text in texts]
    return [*(pair.text.positive for pair in pairs), *negatives]


def _given_scores(pairs: Sequence[TokenPair], hard_negatives: int) -> tuple[list[list[int]], list[list[float]]]:
    """Each pair's documents with given scores, as rows in the order of `_texts`, and these scores."""
    documents: list[list[int]] = []
    scores: list[list[float]] = []
    next_negative = len(pairs)
    for row, pair in enumerate(pairs):
        count = len(pair.negatives[:hard_negatives])
        documents.append([row, *range(next_negative, next_negative + count)] if pair.text.scores else [])
        scores.append(list(pair.text.scores[: 1 + count]))
        next_negative += count
    return documents, scores
