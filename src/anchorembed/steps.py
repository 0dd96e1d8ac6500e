"""A training step of each stage: a step's pairs in, gradients accumulated and metrics out.

The embedder embeds, the objectives compare; a step brings them together, a token budget at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from anchorembed.contrastive import distillation, false_negatives, info_nce, matryoshka, similarities, too_similar
from anchorembed.distributed import gathered, processes, rank, sharded, shares, summed
from anchorembed.embedder import Embedder
from anchorembed.gradcache import cached_backward
from anchorembed.kernels import gradients_in_place, weights_unchanged
from anchorembed.packing import PackedBatch, micro_batches, pack
from anchorembed.reconstruction import Decoding, decoding, insert_anchors, linear_cross_entropy
from anchorembed.runtime import autocast
from anchorembed.tokens import TokenPair

Metrics = dict[str, float]
Direction = Literal["q2d", "d2q", "d2d", "next_token"]
_DIRECTIONS: tuple[Direction, Direction] = ("q2d", "d2q")


def _cast_once(module: nn.Module) -> AbstractContextManager[object]:
    """Cast each weight once a step, unless weights are sharded: whole copies of all of them would undo that."""
    return nullcontext() if sharded(module) else weights_unchanged()


def _by_length(costs: Sequence[int], budget: int) -> tuple[list[int], list[range]]:
    """Items by cost, highest first, and runs of that order within the budget.

    Like lengths together make few and large buckets of attention, and buffers of few sizes, which memory is kept for.
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
                bag, bags_P = self._cross_entropy(anchors_NH, targets.targets, asked_P, targets.counts)
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
        self, states: Tensor, targets_P: Tensor, weights_P: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        head = self.embedder.backbone.head
        return linear_cross_entropy(
            states, head.weight, targets_P, weights_P, head.bias, head.scale, head.softcap, counts
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
        weights = self._weights(number)
        every = self.rows(number, pairs)
        totals = _target_tokens([row for pair in every for row in pair])
        per_token = {direction: weight / totals[direction] for direction, weight in weights.items()}
        runs = [self._micro_batches(rows) for rows in shares(every)]
        idle = max(map(len, runs)) - len(runs[rank()])
        sums = self._accumulate(every[0], idle, runs[rank()], per_token)
        losses = summed(torch.tensor([sums[direction] for direction in weights], device=self.device)).tolist()
        metrics: Metrics = {"loss": 0.0}
        for (direction, weight), both in zip(weights.items(), losses, strict=True):
            written, bag = (loss / totals[direction] for loss in both)
            metrics["loss"] += weight * (written + self.bag_weight * bag)
            metrics |= self._named(direction, written, bag)
        return metrics

    def _named(self, direction: Direction, written: float, bag: float) -> Metrics:
        """A direction's two losses, of those that are trained."""
        anchored = direction != "next_token"
        found = {f"loss_{direction}": written} if self.decode or not anchored else {}
        return found | ({f"loss_bag_{direction}": bag} if self.bag_weight and anchored else {})

    def _accumulate(
        self, any_rows: list[Row], idle: int, runs: Sequence[list[Row]], per_token: dict[Direction, float]
    ) -> dict[Direction, tuple[float, float]]:
        """Backpropagate this process's micro-batches; returns the sums of their losses, by decoding and by the bag.

        Before them come ``idle`` ones that count for nothing: sharded weights are gathered in each forward, so all
        processes must do equally many.
        """
        sums = dict.fromkeys(per_token, (0.0, 0.0))
        alone = processes() == 1  # what wraps the module must see every gradient
        nothing = dict.fromkeys(per_token, 0.0)
        with _cast_once(self.module), gradients_in_place() if alone else nullcontext():
            for number in range(-idle, len(runs)):
                micro, weights = (runs[number], per_token) if number >= 0 else (any_rows, nothing)
                with nullcontext() if number == len(runs) - 1 else self.unsynced():
                    loss, losses = self._run(micro, weights)
                    (loss if alone else loss * processes()).backward()
                if number >= 0:
                    for row, (written, bag) in zip(micro, losses, strict=True):
                        before = sums[row.direction]
                        sums[row.direction] = before[0] + written, before[1] + bag
        return sums

    def _micro_batches(self, rows: Sequence[list[Row]]) -> list[list[Row]]:
        """Pairs' rows in runs within the budget, pairs of like length together, longest first."""
        order, runs = _by_length([sum(row.cost for row in pair) for pair in rows], self.budget)
        return [[row for i in order[run.start : run.stop] for row in rows[i]] for run in runs]

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
        runs = micro_batches([row.cost for row in rows], self.budget)
        per_token = {row.direction: 1.0 for row in rows}
        losses = [pair for run in runs for pair in self._run(rows[run.start : run.stop], per_token)[1]]
        tokens = sum(len(row.text) + 1 for row in rows)
        return sum(written for written, _ in losses) / tokens, sum(bag for _, bag in losses) / tokens

    def _weights(self, number: int) -> dict[Direction, float]:
        if self.directions == "both":
            return {"q2d": 1 - self.d2q_weight, "d2q": self.d2q_weight}
        if self.directions == "alternate":
            return {_DIRECTIONS[number % 2]: 1.0}
        return {self.directions: 1.0}

    def _run(self, rows: Sequence[Row], per_token: dict[Direction, float]) -> tuple[Tensor, list[tuple[float, float]]]:
        """Run the module: the weighted loss, and each row's summed losses in nats, by decoding and by the bag."""
        anchored = all(row.source for row in rows)
        sources = pack([row.source for row in rows]).to(self.device) if anchored else None
        targets = decoding([row.text for row in rows], self.end_id, self.sink and anchored).to(self.device)
        weights_N = torch.tensor([per_token[row.direction] for row in rows], device=self.device)
        weights_P = weights_N.repeat_interleave(targets.counts)
        decode = self.decode or not anchored or not torch.is_grad_enabled()  # held-out pairs are written in any case
        loss, *losses = self.module(sources, targets, weights_P, self.bag_weight, decode)
        sums_N2 = torch.segment_reduce(torch.stack(losses, dim=1), "sum", lengths=targets.counts)
        return loss, [(written, bag) for written, bag in sums_N2.tolist()]


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
        shared = shares(pairs)
        parts = [_texts(part, self.hard_negatives) for part in shared]
        counts = [sum(map(len, part)) for part in parts]
        kinds = [kind for part in parts for kind, texts in enumerate(part) for _ in texts]
        order = torch.tensor(sorted(range(len(kinds)), key=lambda row: kinds[row]), device=self.device)
        guided = self._guided(shared[rank()])
        whole, _ = self._problem(pairs, None if guided is None else gathered(guided, counts)[order])

        chunks, rows = zip(*(self._chunks([text for texts in part for text in texts]) for part in parts), strict=True)

        def loss(embeddings: Tensor) -> Tensor:
            own = embeddings[rows[rank()]]
            nothing = 0.0 * embeddings[len(own) :].sum()
            return whole(gathered(own, counts)[order]) + nothing

        # Sharded weights are gathered in each forward, so all processes must do equally many: some for nothing.
        idle = [pack([pairs[0].query]).to(self.device)] * (max(map(len, chunks)) - len(chunks[rank()]))
        with _cast_once(self.module):
            value = cached_backward(self._embed, chunks[rank()] + idle, loss, processes(), self.unsynced)
        return {"loss": float(value)}

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss on held-out pairs, each the others' negatives; accuracy is the share that finds its own first."""
        loss, excluded_QD = self._problem(pairs, self._guided(pairs))
        sequences = [text for texts in _texts(pairs, self.hard_negatives) for text in texts]
        chunks, rows = self._chunks(sequences)
        embeddings = torch.cat([self._embed(chunk) for chunk in chunks])[rows]
        scores_QD = similarities(embeddings[: len(pairs)], embeddings[len(pairs) :])
        scores_QD = scores_QD.masked_fill(excluded_QD, float("-inf"))
        right = scores_QD.argmax(dim=1) == torch.arange(len(pairs), device=self.device)
        return {"held_out_loss": float(loss(embeddings)), "held_out_accuracy": float(right.float().mean())}

    def _problem(self, pairs: Sequence[TokenPair], guided: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The loss of all embeddings (queries, positives, negatives); and what is no negative of what, [Q, D]."""
        queries, positives, negatives = _texts(pairs, self.hard_negatives)
        documents = positives + negatives
        rows = list(range(len(pairs)))
        excluded = false_negatives([*map(tuple, queries)], [*map(tuple, documents)], rows).to(self.device)
        positives_Q = torch.tensor(rows, device=self.device)
        candidates, given = _scored(pairs, self.hard_negatives)

        def loss(embeddings: Tensor) -> Tensor:
            left_out = excluded
            if self.mask_above is not None:
                judging = embeddings if guided is None else guided
                by = (judging[: len(queries)], judging[len(queries) :])
                left_out = excluded | too_similar(*by, positives_Q, self.mask_above)

            def compared(queries_QH: Tensor, documents_DH: Tensor) -> Tensor:
                value = info_nce(queries_QH, documents_DH, positives_Q, self.scale, left_out)
                if self.distill:
                    value = value + self.distill * distillation(queries_QH, documents_DH, candidates, given, self.scale)
                return value

            every = dict.fromkeys((*self.dimensions, embeddings.shape[1]))
            return matryoshka(compared, embeddings[: len(queries)], embeddings[len(queries) :], tuple(every))

        return loss, excluded

    def _guided(self, pairs: Sequence[TokenPair]) -> Tensor | None:
        """The guide's vectors of queries, positives and negatives, in that order, if there is a guide."""
        if self.guide is None:
            return None
        negatives = [text for pair in pairs for text in pair.text.negatives[: self.hard_negatives]]
        queries = self.guide.encode([pair.text.query for pair in pairs], "query")
        documents = self.guide.encode([*(pair.text.positive for pair in pairs), *negatives])
        return torch.cat([torch.from_numpy(queries), torch.from_numpy(documents)]).to(self.device)

    def _chunks(self, sequences: Sequence[list[int]]) -> tuple[list[PackedBatch], Tensor]:
        """Sequences in chunks within the budget, and the row of each among the chunks' embeddings."""
        order, runs = _by_length([len(sequence) for sequence in sequences], self.budget)
        chunks = [pack([sequences[i] for i in order[run.start : run.stop]]).to(self.device) for run in runs]
        return chunks, torch.tensor(order, dtype=torch.long, device=self.device).argsort()

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
