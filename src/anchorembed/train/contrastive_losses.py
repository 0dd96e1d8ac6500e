"""Stage II: InfoNCE on anchors, in float32. Pure functions that never see a model.

Axes: Q queries, D documents (the queries' positives in order, then hard negatives), C candidates, H hidden size.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorembed.model.packing import send

SCALE = 50.0


def info_nce(
    queries_QH: Tensor, documents_DH: Tensor, scale: float = SCALE, excluded_QD: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of ``scale * cos(query, document)`` against each query's positive: L_II of Su et al.

    Args:
        queries_QH: query anchors, any length.
        documents_DH: anchors of all documents of the step, which are each other's in-batch negatives.
        scale: inverse temperature.
        excluded_QD: true where a document must not count as a negative of a query.
    """
    scores_QD = scale * similarities(queries_QH, documents_DH)
    if excluded_QD is not None:
        scores_QD = scores_QD.masked_fill(excluded_QD, float("-inf"))
    return F.cross_entropy(scores_QD, torch.arange(len(scores_QD), device=scores_QD.device))


def similarities(queries_QH: Tensor, documents_DH: Tensor) -> Tensor:
    """Cosines [Q, D] in float32, whatever autocast says: times 50 in bfloat16 they would have steps of 0.2."""
    with torch.autocast(queries_QH.device.type, enabled=False):
        return F.normalize(queries_QH.float(), dim=-1) @ F.normalize(documents_DH.float(), dim=-1).T


def equal(keys: Sequence[Hashable], others: Sequence[Hashable]) -> Tensor:
    """Which of ``others`` equal each of ``keys``, [K, O]."""
    numbers: dict[Hashable, int] = {}
    numbers_K = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    numbers_O = torch.tensor([numbers.setdefault(key, len(numbers)) for key in others])
    return numbers_K[:, None] == numbers_O


def false_negatives(query_keys: Sequence[Hashable], document_keys: Sequence[Hashable]) -> Tensor:
    """Mark, [Q, D], documents that must not be negatives of a query because they answer it.

    Their key equals that of the query's positive, of the positive of another query with the same key, or of the query.
    """
    excluded_QD = equal(document_keys[: len(query_keys)], document_keys) | equal(query_keys, document_keys)
    groups: dict[Hashable, list[int]] = {}
    for row, query in enumerate(query_keys):
        groups.setdefault(query, []).append(row)
    for rows in groups.values():
        if len(rows) > 1:
            excluded_QD[rows] = excluded_QD[rows].any(dim=0)
    return excluded_QD.fill_diagonal_(False)


def has_negatives(excluded_QD: Tensor) -> bool:
    """Whether any query has a negative that is not excluded; without one the loss and its gradient are 0."""
    return int((~excluded_QD).sum()) > len(excluded_QD)  # positives are never excluded


def too_similar(queries_QH: Tensor, documents_DH: Tensor, margin: float) -> Tensor:
    """Mark, [Q, D], documents nearer to a query than its positive by more than ``margin``: likely unjudged positives.

    The vectors may be the model's own or another model's, a guide's (Solatorio, 2024). A positive is never marked.
    """
    scores_QD = similarities(queries_QH.detach(), documents_DH.detach())
    return (scores_QD > scores_QD.diagonal()[:, None] + margin).fill_diagonal_(False)


@dataclass(frozen=True, slots=True)
class ScoredDocuments:
    """Candidates of each query with scores by another model: C for each query, padded if a query has fewer.

    Attributes:
        documents_QC: indices into the documents.
        targets_QC: log softmax of the given scores; minus infinity for padding.
        weights_Q: 1 / n for each of the n queries with two candidates or more, 0 for the others.
    """

    documents_QC: Tensor
    targets_QC: Tensor
    weights_Q: Tensor

    def to(self, device: torch.device) -> "ScoredDocuments":
        """Return the same on ``device``."""
        return ScoredDocuments(*(send(part, device) for part in (self.documents_QC, self.targets_QC, self.weights_Q)))


def scored_documents(documents: Sequence[Sequence[int]], given: Sequence[Sequence[float]]) -> ScoredDocuments:
    """Tabulate, on the CPU, each query's candidates and their given scores: logits, of which only differences matter.

    A query with fewer than two candidates has no gradient and is left out of the mean.
    """
    most = max([1, *map(len, documents)])
    table, scores = torch.zeros(len(documents), most, dtype=torch.long), torch.full((len(documents), most), -torch.inf)
    for row, (chosen, values) in enumerate(zip(documents, given, strict=True)):
        table[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.long)
        scores[row, : len(chosen)] = torch.tensor(values, dtype=torch.float32)
        scores[row, len(chosen) : 1] = 0.0  # padding of a query without candidates, whose weight is 0
    teaches = torch.tensor([float(len(chosen) > 1) for chosen in documents])
    return ScoredDocuments(table, scores.log_softmax(1), teaches / teaches.sum().clamp(min=1))


def distillation(queries_QH: Tensor, documents_DH: Tensor, given: ScoredDocuments, scale: float = SCALE) -> Tensor:
    """Mean over queries of KL(softmax(given scores) || softmax(scale * cosines)), each over the query's own candidates.

    Args:
        queries_QH: query anchors, any length.
        documents_DH: anchors of all documents of the step.
        given: the candidates and another model's scores of them.
        scale: inverse temperature of the cosines.
    """
    scores_QC = (scale * similarities(queries_QH, documents_DH)).gather(1, given.documents_QC)
    padding_QC = given.targets_QC == -torch.inf
    log_shares_QC = scores_QC.masked_fill(padding_QC, -torch.inf).log_softmax(1)
    terms_QC = given.targets_QC.exp() * (given.targets_QC - log_shares_QC).masked_fill(padding_QC, 0.0)
    return (terms_QC.sum(1) * given.weights_Q).sum()


def matryoshka(loss: Callable[[Tensor], Tensor], embeddings: Tensor, dimensions: Sequence[int]) -> Tensor:
    """Mean of a loss of vectors [N, H] over vectors cut to each of ``dimensions`` and whole ones (Kusupati, 2022)."""
    sizes = dict.fromkeys((*dimensions, embeddings.shape[1]))
    return torch.stack([loss(embeddings[:, :size]) for size in sizes]).mean()
