"""Stage II: InfoNCE on anchors, in float32. Pure functions that never see a model.

Axes: Q queries, D documents (positives first, then hard negatives), H hidden size.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 50.0


def info_nce(
    queries_QH: Tensor,
    documents_DH: Tensor,
    positives_Q: Tensor,
    scale: float = SCALE,
    excluded_QD: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of ``scale * cos(query, document)`` against each query's positive: L_II of Su et al.

    Args:
        queries_QH: query anchors, any length.
        documents_DH: anchors of all documents of the step, which are each other's in-batch negatives.
        positives_Q: index into the documents of each query's positive.
        scale: inverse temperature.
        excluded_QD: true where a document must not count as a negative of a query.
    """
    scores_QD = scale * similarities(queries_QH, documents_DH)
    if excluded_QD is not None:
        scores_QD = scores_QD.masked_fill(excluded_QD, float("-inf"))
    return F.cross_entropy(scores_QD, positives_Q)


def similarities(queries_QH: Tensor, documents_DH: Tensor) -> Tensor:
    """Cosines [Q, D] in float32, whatever autocast says: times 50 in bfloat16 they would have steps of 0.2."""
    with torch.autocast(queries_QH.device.type, enabled=False):
        return F.normalize(queries_QH.float(), dim=-1) @ F.normalize(documents_DH.float(), dim=-1).T


def false_negatives(
    query_keys: Sequence[Hashable], document_keys: Sequence[Hashable], positives: Sequence[int]
) -> Tensor:
    """Mark, [Q, D], documents that must not be negatives of a query, as they would be right.

    Their text equals the query's positive, the positive of another query with the same text, or the query itself.
    """
    numbers = {key: number for number, key in enumerate(dict.fromkeys(document_keys))}
    documents_D = torch.tensor([numbers[key] for key in document_keys])
    positives_Q = torch.tensor(positives)
    excluded = documents_D[positives_Q][:, None] == documents_D
    groups: dict[Hashable, list[int]] = {}
    for row, query in enumerate(query_keys):
        groups.setdefault(query, []).append(row)
    for query, rows in groups.items():
        excluded[rows] = excluded[rows].any(dim=0) | (documents_D == numbers.get(query, -1))
    excluded[torch.arange(len(positives)), positives_Q] = False
    return excluded


def too_similar(queries_QH: Tensor, documents_DH: Tensor, positives_Q: Tensor, margin: float) -> Tensor:
    """Mark, [Q, D], documents nearer to a query than its positive by more than ``margin``: likely unjudged positives.

    The vectors may be the model's own or another model's, a guide's (Solatorio, 2024). A positive is never marked.
    """
    scores_QD = similarities(queries_QH.detach(), documents_DH.detach())
    rows = torch.arange(len(positives_Q), device=scores_QD.device)
    marked = scores_QD > scores_QD[rows, positives_Q][:, None] + margin
    marked[rows, positives_Q] = False
    return marked


def distillation(
    queries_QH: Tensor,
    documents_DH: Tensor,
    candidates: Sequence[Sequence[int]],
    given: Sequence[Sequence[float]],
    scale: float = SCALE,
) -> Tensor:
    """Mean over queries of KL(softmax(given scores) || softmax(scale * cosines)), each over the query's own candidates.

    Args:
        queries_QH: query anchors, any length.
        documents_DH: anchors of all documents of the step.
        candidates: of each query, indices into the documents; a query with fewer than two teaches nothing and is left
            out of the mean.
        given: of each query, another model's scores of those candidates: logits, of which only differences matter.
        scale: inverse temperature of the cosines.
    """
    scores_QD = scale * similarities(queries_QH, documents_DH)
    losses = []
    for row, (chosen, scores) in enumerate(zip(candidates, given, strict=True)):
        if len(chosen) > 1:
            target = torch.tensor(scores, dtype=torch.float32, device=scores_QD.device).log_softmax(0)
            losses.append(
                F.kl_div(scores_QD[row, list(chosen)].log_softmax(0), target, reduction="sum", log_target=True)
            )
    return torch.stack(losses).mean() if losses else scores_QD.new_zeros(())


def matryoshka(
    loss: Callable[[Tensor, Tensor], Tensor], queries_QH: Tensor, documents_DH: Tensor, dimensions: Sequence[int]
) -> Tensor:
    """Mean of a loss over the first ``dimensions`` of the vectors, so that cut vectors still compare (Kusupati, 2022).

    Raises:
        ValueError: if a dimension is below 1 or above H.
    """
    for dimension in dimensions:
        if not 1 <= dimension <= queries_QH.shape[-1]:
            raise ValueError(f"dimensions: {dimension} is not between 1 and {queries_QH.shape[-1]}")
    losses = [loss(queries_QH[:, :dimension], documents_DH[:, :dimension]) for dimension in dimensions]
    return torch.stack(losses).mean()
