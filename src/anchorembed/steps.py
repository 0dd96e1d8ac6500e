"""A training step of each stage: a step's pairs in, gradients accumulated and metrics out.

The embedder embeds, the objectives compare; a step brings them together, a token budget at a time. ``prepare`` does
what the CPU can do beforehand (packing, targets, weights, masks) and sends it to the device; ``run`` only computes
there and waits for nothing; ``step`` is both, and reads the metrics back.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from anchorembed.contrastive import (
    Candidates,
    candidates,
    distillation,
    false_negatives,
    info_nce,
    matryoshka,
    similarities,
    too_similar,
)
from anchorembed.distributed import gathered, processes, rank, shares, summed
from anchorembed.embedder import Embedder
from anchorembed.gradcache import cached_backward
from anchorembed.packing import PackedBatch, micro_batches, pack, send
from anchorembed.reconstruction import Decoding, decoding, insert_anchors, linear_cross_entropy
from anchorembed.runtime import autocast
from anchorembed.tokens import TokenPair

Metrics = dict[str, float]
Measured = dict[str, Tensor]  # metrics that still are on the device, scalars
Direction = Literal["q2d", "d2q", "d2d", "next_token"]
_DIRECTIONS: tuple[Direction, Direction] = ("q2d", "d2q")


def read_back(measured: Measured) -> Metrics:
    """Metrics as numbers: the one time in a step that the CPU waits for the device."""
    if not measured:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def _by_length(costs: Sequence[int], budget: int) -> tuple[list[int], list[range]]:
    """Items by cost, highest first, and runs of that order within the budget.

    Like lengths together make few and large buckets of attention.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    return order, list(micro_batches([costs[i] for i in order], budget))


class ReconstructionModule(nn.Module):
    """Both passes, head and loss of Stage I in one ``forward``, so that whatever wraps it sees all of a step."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(
        self,
        sources: PackedBatch | None,
        targets: Decoding,
        weights_P: Tensor,
        bag_weight: float = 0.0,
        decode: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write text i of ``targets`` from the anchor of source i; without sources, after EOS alone.

        With ``bag_weight`` the anchor alone, without decoding, must tell the same targets in any order, too.

        Returns:
            The loss weighted by ``weights_P``, and each target token's losses [P] in nats, by decoding and by the bag;
            zeros where there is no such loss.
        """
        backbone = self.embedder.backbone
        loss, losses_P, bags_P = weights_P.new_zeros(()), torch.zeros_like(weights_P), torch.zeros_like(weights_P)
        with autocast(backbone.device, self.embedder.dtype):
            anchors_NH = None if sources is None else self.embedder(sources)
            if decode:
                states_PH = self._decoded(anchors_NH, targets)
                loss, losses_P = self._cross_entropy(states_PH, targets.targets, weights_P)
            if bag_weight and anchors_NH is not None:
                asked_P = bag_weight * weights_P
                bags = (targets.counts, targets.owners)
                bag, bags_P = self._cross_entropy(anchors_NH, targets.targets, asked_P, bags)
                loss = loss + bag
        return loss, losses_P, bags_P

    def _decoded(self, anchors_NH: Tensor | None, targets: Decoding) -> Tensor:
        """States that have a target, [P, H]."""
        backbone = self.embedder.backbone
        vectors_TH = backbone.embed(targets.batch.tokens)
        if anchors_NH is not None:
            vectors_TH = insert_anchors(vectors_TH, anchors_NH, targets.slots)
        states_PH = backbone.states(vectors_TH, targets.batch)
        if len(targets.predicting) < len(states_PH):
            states_PH = states_PH[targets.predicting]
        return states_PH

    def _cross_entropy(
        self,
        states: Tensor,
        targets_P: Tensor,
        weights_P: Tensor,
        bags: tuple[Sequence[int], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        head = self.embedder.backbone.head
        return linear_cross_entropy(
            states, head.weight, targets_P, weights_P, head.bias, head.scale, head.softcap, bags
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One text to write: from which templated ids (none for next tokens), which own tokens, which direction that is."""

    source: list[int]
    text: list[int]
    direction: Direction

    @property
    def cost(self) -> int:
        """Tokens computed in both passes, at most: with a sink."""
        return len(self.source) + len(self.text) + 2


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Texts to write at once: ``masks_DP`` says which targets are of which direction, ``weights_P`` what they count."""

    sources: PackedBatch | None
    targets: Decoding
    weights_P: Tensor
    masks_DP: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on ``device``."""
        sources = None if self.sources is None else self.sources.to(device)
        return MicroBatch(sources, self.targets.to(device), send(self.weights_P, device), send(self.masks_DP, device))


@dataclass(frozen=True, slots=True)
class ReconstructionBatch:
    """A step's pairs on the device: this process's micro-batches, and the target tokens of all processes.

    The first ``idle`` micro-batches count for nothing: sharded weights are gathered in each forward, so all processes
    must do equally many.
    """

    micro: list[MicroBatch]
    idle: int
    weights: dict[Direction, float]
    totals: dict[Direction, int]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Stage I on a step's pairs: which directions, how weighted, how many tokens at once, with a sink or without.

    L_I has ``bag_weight`` times the loss of the bags of words beside that of the decoder, or without it.
    ``unsynced`` opens a context in which gradients stay in this process: all micro-batches but the last.
    """

    module: nn.Module
    device: torch.device
    end_id: int
    directions: Literal["both", "alternate", "q2d", "d2q", "d2d", "next_token"]
    d2q_weight: float
    budget: int
    sink: bool = False
    bag_weight: float = 0.0
    decode: bool = True
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext
    hard_negatives: ClassVar[int] = 0  # it uses none

    def rows(self, number: int, pairs: Sequence[TokenPair]) -> list[list[Row]]:
        """What a step writes, by pair."""
        return [[row for direction in self._weights(number) for row in _rows(pair, direction)] for pair in pairs]

    def step(self, number: int, pairs: Sequence[TokenPair]) -> Metrics:
        """Accumulate the gradient of L_I over the pairs; micro-batches and processes change nothing but memory."""
        return read_back(self.run(self.prepare(number, pairs)))

    def prepare(self, number: int, pairs: Sequence[TokenPair]) -> ReconstructionBatch:
        """Lay out step ``number`` and send it to the device."""
        weights = self._weights(number)
        every = self.rows(number, pairs)
        totals = _target_tokens([row for pair in every for row in pair])
        per_token = {direction: weight / totals[direction] for direction, weight in weights.items()}
        runs = [self._micro_batches(rows) for rows in shares(every)]
        idle = max(map(len, runs)) - len(runs[rank()])
        nothing = [self._micro_batch(every[0], dict.fromkeys(weights, 0.0))] * idle
        return ReconstructionBatch(
            nothing + [self._micro_batch(rows, per_token) for rows in runs[rank()]], idle, weights, totals
        )

    def run(self, batch: ReconstructionBatch) -> Measured:
        """Backpropagate a step's micro-batches; returns the losses of all processes."""
        sums_2D = torch.zeros(2, len(batch.weights), device=self.device)
        for number, micro in enumerate(batch.micro, 1):
            with nullcontext() if number == len(batch.micro) else self.unsynced():
                loss, found_2D = self._run(micro)
                (loss if processes() == 1 else loss * processes()).backward()
            if number > batch.idle:
                sums_2D += found_2D
        sums_2D = summed(sums_2D)
        measured: Measured = {}
        loss = torch.zeros((), device=self.device)
        for place, (direction, weight) in enumerate(batch.weights.items()):
            written, bag = (sums_2D[kind, place] / batch.totals[direction] for kind in (0, 1))
            loss = loss + weight * (written + self.bag_weight * bag)
            measured |= self._named(direction, written, bag)
        return {"loss": loss, **measured}

    def _named(self, direction: Direction, written: Tensor, bag: Tensor) -> Measured:
        """A direction's two losses, of those that are trained."""
        anchored = direction != "next_token"
        found = {f"loss_{direction}": written} if self.decode or not anchored else {}
        return found | ({f"loss_bag_{direction}": bag} if self.bag_weight and anchored else {})

    def _micro_batches(self, rows: Sequence[list[Row]]) -> list[list[Row]]:
        """Pairs' rows in runs within the budget, pairs of like length together, longest first."""
        order, runs = _by_length([sum(row.cost for row in pair) for pair in rows], self.budget)
        return [[row for i in order[run.start : run.stop] for row in rows[i]] for run in runs]

    def _micro_batch(self, rows: Sequence[Row], per_token: dict[Direction, float]) -> MicroBatch:
        """Rows laid out on the device; each target token weighs what its direction's do."""
        anchored = all(row.source for row in rows)
        sources = pack([row.source for row in rows]) if anchored else None
        targets = decoding([row.text for row in rows], self.end_id, self.sink and anchored)
        weights_P = torch.tensor([per_token[row.direction] for row in rows])[targets.owners]
        masks_DN = torch.tensor([[float(row.direction == direction) for row in rows] for direction in per_token])
        return MicroBatch(sources, targets, weights_P, masks_DN[:, targets.owners]).to(self.device)

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss and anchor gain of each direction on held-out pairs, in nats a token.

        The gain is the loss with another pair's vector minus the loss with its own: how much of the text the decoder
        reads from the vector, beyond what it knows about the domain. Of the bag, if that is trained, too.
        """
        metrics: Metrics = {}
        strangers = [*pairs[1:], pairs[0]]
        own_direction: tuple[Direction, ...] = ("d2d",) if self.directions == "d2d" else ()
        for direction in _DIRECTIONS + own_direction:
            own = self._mean_losses([_row(pair, pair, direction) for pair in pairs])
            other = self._mean_losses(
                [_row(stranger, pair, direction) for stranger, pair in zip(strangers, pairs, strict=True)]
            )
            metrics |= {f"held_out_{direction}": own[0], f"gain_{direction}": other[0] - own[0]}
            if self.bag_weight:
                metrics |= {f"held_out_bag_{direction}": own[1], f"gain_bag_{direction}": other[1] - own[1]}
        return metrics

    def _mean_losses(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Mean losses over all target tokens of rows of one direction, in nats: by decoding and by the bag."""
        tokens = sum(len(row.text) + 1 for row in rows)
        runs = micro_batches([row.cost for row in rows], self.budget)
        batches = (self._micro_batch(rows[run.start : run.stop], {rows[0].direction: 1.0}) for run in runs)
        written, bag = (torch.stack([self._run(micro)[1] for micro in batches]).sum(0) / tokens)[:, 0].tolist()
        return written, bag

    def _weights(self, number: int) -> dict[Direction, float]:
        if self.directions == "both":
            return {"q2d": 1 - self.d2q_weight, "d2q": self.d2q_weight}
        if self.directions == "alternate":
            return {_DIRECTIONS[number % 2]: 1.0}
        return {self.directions: 1.0}

    def _run(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Run the module: the weighted loss, and each direction's summed losses in nats, [2, D], decoding and bag."""
        anchored = micro.sources is not None
        decode = self.decode or not anchored or not torch.is_grad_enabled()  # held-out pairs are written in any case
        loss, *losses = self.module(micro.sources, micro.targets, micro.weights_P, self.bag_weight, decode)
        return loss, torch.stack(losses) @ micro.masks_DP.T


def _rows(pair: TokenPair, direction: Direction) -> list[Row]:
    if direction == "next_token":
        return [Row([], pair.query_text, direction), Row([], pair.document_text, direction)]
    return [_row(pair, pair, direction)]


def _row(source: TokenPair, target: TokenPair, direction: Direction) -> Row:
    if direction == "d2q":
        return Row(source.document, target.query_text, direction)
    return Row(source.query if direction == "q2d" else source.document, target.document_text, direction)


def _target_tokens(rows: Sequence[Row]) -> dict[Direction, int]:
    totals = dict.fromkeys((row.direction for row in rows), 0)
    for row in rows:
        totals[row.direction] += len(row.text) + 1
    return totals


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
        idle = [pack([pairs[0].query])] * (max(map(len, chunks)) - len(chunks[rank()]))
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
        order, runs = _by_length([len(sequence) for sequence in sequences], self.budget)
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
