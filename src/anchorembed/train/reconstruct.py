"""A training step of each stage: a step's pairs in, gradients accumulated and metrics out.

The embedder embeds, the objectives compare; a step brings them together, a token budget at a time. ``prepare`` does
what the CPU can do beforehand (packing, targets, weights, masks) and sends it to the device; ``run`` only computes
there and waits for nothing; ``step`` is both, and reads the metrics back.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch, micro_batches, pack, send
from anchorembed.model.tokens import TokenPair
from anchorembed.system.device import autocast
from anchorembed.system.processes import processes, rank, shares, summed, summed_with_gradient, whole
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoding import Decoding, centred, decoding, insert_anchors, target_count
from anchorembed.train.gradcache import cached_backward
from anchorembed.train.stage import Measured, Metrics, by_length, read_back

Direction = Literal["q2d", "d2q", "d2d", "next_token"]
_DIRECTIONS: tuple[Direction, Direction] = ("q2d", "d2q")


class ReconstructionModule(nn.Module):
    """Both passes, head and loss of Stage I in one ``forward``, so that whatever wraps it sees all of a step."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(
        self,
        sources: PackedBatch | None,
        targets: Decoding | None,
        weights_P: Tensor | None = None,
        anchors_NH: Tensor | None = None,
        centre: Callable[[Tensor], Tensor] | None = None,
        bag_weight: float = 0.0,
        decode: bool = True,
    ) -> tuple[Tensor, ...]:
        """Write text i of ``targets`` from the anchor of source i, or from anchor i; without either, after EOS alone.

        With ``bag_weight`` the anchor alone, without decoding, must tell the same targets in any order, too. ``centre``
        is applied to the anchors of sources before they enter.

        Returns:
            The loss weighted by ``weights_P``, and each target token's losses [P] in nats, by decoding and by the bag;
            zeros where there is no such loss. Without targets, the anchors of the sources, [N, H].
        """
        backbone = self.embedder.backbone
        with autocast(backbone.device, self.embedder.dtype):
            if sources is not None:
                anchors_NH = self.embedder(sources)
                anchors_NH = anchors_NH if centre is None else centre(anchors_NH)
            if targets is None or weights_P is None:
                if anchors_NH is None:
                    return ()
                if processes() > 1 and torch.is_grad_enabled():
                    # DDP waits for a gradient of every weight, also of a head that this pass has no use for
                    anchors_NH = anchors_NH + 0.0 * backbone.head.weight.sum()
                return (anchors_NH,)
            loss, losses_P, bags_P = weights_P.new_zeros(()), torch.zeros_like(weights_P), torch.zeros_like(weights_P)
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
    limit: int | None = None  # of the text's tokens that are written

    @property
    def targets(self) -> int:
        """Target tokens."""
        return target_count(self.text, self.limit)

    @property
    def side(self) -> int:
        """0 if it is written from a query, 1 from a document."""
        return int(self.direction != "q2d")

    @property
    def cost(self) -> int:
        """Tokens computed in both passes, at most: with a sink."""
        return len(self.source) + self.targets + 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Texts to write at once: ``masks_DP`` says which targets are of which direction, ``weights_P`` what they count.

    ``sides_N`` is 0 for a text written from a query, 1 from a document, -1 where it counts for nothing.
    """

    sources: PackedBatch | None
    targets: Decoding
    weights_P: Tensor
    masks_DP: Tensor
    sides_N: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on ``device``."""
        sources = None if self.sources is None else self.sources.to(device)
        rest = (send(tensor, device) for tensor in (self.weights_P, self.masks_DP, self.sides_N))
        return MicroBatch(sources, self.targets.to(device), *rest)


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
    anchor: Literal["raw", "centred", "centred_gradient"] = "raw"
    target_tokens: int | None = None
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext
    hard_negatives: ClassVar[int] = 0  # it uses none

    def rows(self, number: int, pairs: Sequence[TokenPair]) -> list[list[Row]]:
        """What a step writes, by pair."""
        limit = self.target_tokens
        return [[row for direction in self._weights(number) for row in _rows(pair, direction, limit)] for pair in pairs]

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
        nothing = [self._micro_batch(every[0], dict.fromkeys(weights, 0.0), is_idle=True) for _ in range(idle)]
        return ReconstructionBatch(
            nothing + [self._micro_batch(rows, per_token) for rows in runs[rank()]], idle, weights, totals
        )

    def run(self, batch: ReconstructionBatch) -> Measured:
        """Backpropagate a step's micro-batches; returns the losses of all processes."""
        anchored = batch.micro[0].sources is not None
        if self.anchor == "raw" or not anchored:
            sums_2D = self._backward(batch)
        elif len(batch.micro) == 1:
            sums_2D = self._backward(batch, centre=self._centring(batch.micro[0].sides_N))
        else:
            sums_2D = self._cached_backward(batch)
        sums_2D = summed(sums_2D)
        measured: Measured = {}
        loss = torch.zeros((), device=self.device)
        for place, (direction, weight) in enumerate(batch.weights.items()):
            written, bag = (sums_2D[kind, place] / batch.totals[direction] for kind in (0, 1))
            loss = loss + weight * (written + self.bag_weight * bag)
            measured |= self._named(direction, written, bag)
        return {"loss": loss, **measured}

    def _backward(
        self,
        batch: ReconstructionBatch,
        anchors: Sequence[Tensor] | None = None,
        centre: Callable[[Tensor], Tensor] | None = None,
        is_last: bool = True,
    ) -> Tensor:
        """Backpropagate each micro-batch, from its sources or from given anchors: this process's losses, [2, D]."""
        sums_2D = torch.zeros(2, len(batch.weights), device=self.device)
        for number, micro in enumerate(batch.micro):
            with nullcontext() if is_last and number + 1 == len(batch.micro) else self.unsynced():
                loss, found_2D = self._run(micro, None if anchors is None else anchors[number], centre)
                (loss if processes() == 1 else loss * processes()).backward()
            if number >= batch.idle:
                sums_2D += found_2D
        return sums_2D

    def _cached_backward(self, batch: ReconstructionBatch) -> Tensor:
        """The same where anchors depend on the whole step's, in the memory of one micro-batch, as GradCache does it.

        Encode all without a graph, write each micro-batch from its anchors, then encode each again with a graph and
        push its anchors' gradients through.
        """
        sides_N = torch.cat([micro.sides_N for micro in batch.micro])
        sizes = [len(micro.sides_N) for micro in batch.micro]
        sums: list[Tensor] = []

        def written(anchors_NH: Tensor) -> Tensor:
            """What has the gradient of the loss with respect to the anchors, through what they become."""
            centred_NH = self._centring(sides_N)(anchors_NH)
            leaves_NH = centred_NH.detach().requires_grad_()
            sums.append(self._backward(batch, leaves_NH.split(sizes), is_last=False))
            return (centred_NH * cast("Tensor", leaves_NH.grad)).sum()

        sources = [micro.sources for micro in batch.micro]
        cached_backward(lambda one: self.module(one, None)[0], sources, written, self.device, unsynced=self.unsynced)
        return sums[0]

    def _centring(self, sides_N: Tensor) -> Callable[[Tensor], Tensor]:
        """What anchors go through before they enter the decoder."""
        length = whole(self._embedder.backbone.token_length())
        return lambda anchors_NH: centred(
            anchors_NH, sides_N, length, summed_with_gradient, self.anchor == "centred_gradient"
        )

    @property
    def _embedder(self) -> Embedder:
        return cast("ReconstructionModule", getattr(self.module, "module", self.module)).embedder  # of what wraps it

    def _named(self, direction: Direction, written: Tensor, bag: Tensor) -> Measured:
        """A direction's two losses, of those that are trained."""
        anchored = direction != "next_token"
        found = {f"loss_{direction}": written} if self.decode or not anchored else {}
        return found | ({f"loss_bag_{direction}": bag} if self.bag_weight and anchored else {})

    def _micro_batches(self, rows: Sequence[list[Row]]) -> list[list[Row]]:
        """Pairs' rows in runs within the budget, pairs of like length together, longest first."""
        order, runs = by_length([sum(row.cost for row in pair) for pair in rows], self.budget)
        return [[row for i in order[run.start : run.stop] for row in rows[i]] for run in runs]

    def _micro_batch(self, rows: Sequence[Row], per_token: dict[Direction, float], is_idle: bool = False) -> MicroBatch:
        """Rows laid out on the device; each target token weighs what its direction's do."""
        anchored = all(row.source for row in rows)
        sources = pack([row.source for row in rows]) if anchored else None
        targets = decoding([row.text for row in rows], self.end_id, self.sink and anchored, rows[0].limit)
        weights_P = torch.tensor([per_token[row.direction] for row in rows])[targets.owners]
        masks_DN = torch.tensor([[float(row.direction == direction) for row in rows] for direction in per_token])
        sides_N = torch.tensor([-1 if is_idle else row.side for row in rows])
        return MicroBatch(sources, targets, weights_P, masks_DN[:, targets.owners], sides_N).to(self.device)

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss and anchor gain of each direction on held-out pairs, in nats a token; how alike their anchors are.

        The gain is the loss with another pair's vector minus the loss with its own: how much of the text the decoder
        reads from the vector, beyond what it knows about the domain; ``gain_first_...`` of each text's first 4 tokens.
        Of the bag, if that is trained, too. Anchors as they are have a mean cosine and an effective rank: near 1 and
        small, they tell texts hardly apart. Centred anchors enter the decoder less the mean of the held-out ones.
        """
        metrics: Metrics = {}
        own_direction: tuple[Direction, ...] = ("d2d",) if self.directions == "d2d" else ()
        for direction in _DIRECTIONS + own_direction:
            rows = [_row(pair, pair, direction, self.target_tokens) for pair in pairs]
            runs = list(micro_batches([row.cost for row in rows], self.budget))
            batches = [self._micro_batch(rows[run.start : run.stop], {direction: 1.0}) for run in runs]
            anchors_NH = torch.cat([self.module(micro.sources, None)[0] for micro in batches])
            spread = _spread(anchors_NH)
            if self.anchor != "raw":
                anchors_NH = self._centring(torch.cat([micro.sides_N for micro in batches]))(anchors_NH)
            own, other = (self._mean_losses(batches, anchors) for anchors in (anchors_NH, anchors_NH.roll(-1, 0)))
            gains = {name: other[name] - own[name] for name in own}
            metrics |= {f"held_out_{direction}": own["all"], f"gain_{direction}": gains["all"]}
            metrics |= {f"gain_first_{direction}": gains["first"]}
            metrics |= {f"{name}_{direction}": value for name, value in spread.items()}
            if self.bag_weight:
                metrics |= {f"held_out_bag_{direction}": own["bag"], f"gain_bag_{direction}": gains["bag"]}
        return metrics

    def _mean_losses(self, batches: Sequence[MicroBatch], anchors_NH: Tensor) -> Metrics:
        """Mean losses of target tokens, in nats: of all, of each text's first 4, and by the bag."""
        sums_5 = torch.zeros(5, device=self.device)
        parts = anchors_NH.split([len(micro.sides_N) for micro in batches])
        for micro, anchors in zip(batches, parts, strict=True):
            targets = micro.targets
            _, losses_P, bags_P = self.module(None, targets, micro.weights_P, anchors, bag_weight=self.bag_weight)
            first_P = (targets.batch.positions[targets.predicting] < 4 + int(self.sink)).float()
            sums_5 += torch.stack(
                [losses_P.sum(), first_P @ losses_P, bags_P.sum(), micro.weights_P.sum(), first_P.sum()]
            )
        written, first, bag, tokens, early = sums_5.tolist()
        return {"all": written / tokens, "first": first / early, "bag": bag / tokens}

    def _weights(self, number: int) -> dict[Direction, float]:
        if self.directions == "both":
            return {"q2d": 1 - self.d2q_weight, "d2q": self.d2q_weight}
        if self.directions == "alternate":
            return {_DIRECTIONS[number % 2]: 1.0}
        return {self.directions: 1.0}

    def _run(
        self, micro: MicroBatch, anchors_NH: Tensor | None, centre: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Run the module: the weighted loss, and each direction's summed losses in nats, [2, D], decoding and bag."""
        decode = self.decode or micro.sources is None
        sources = micro.sources if anchors_NH is None else None
        loss, *losses = self.module(
            sources, micro.targets, micro.weights_P, anchors_NH, centre, self.bag_weight, decode
        )
        return loss, torch.stack(losses) @ micro.masks_DP.T


def _spread(anchors_NH: Tensor) -> Metrics:
    """Mean cosine of two anchors; effective rank, e to the entropy of the spectrum (Roy and Vetterli, 2007)."""
    units_NH = nn.functional.normalize(anchors_NH, dim=-1)
    count = len(units_NH)
    cosine = (units_NH.sum(0).square().sum() - count) / (count * (count - 1))
    shares = nn.functional.normalize(torch.linalg.svdvals(units_NH), p=1, dim=0)
    return read_back({"cosine": cosine, "rank": torch.special.entr(shares).sum().exp()})


def _rows(pair: TokenPair, direction: Direction, limit: int | None) -> list[Row]:
    if direction == "next_token":
        return [Row([], pair.query_text, direction, limit), Row([], pair.document_text, direction, limit)]
    return [_row(pair, pair, direction, limit)]


def _row(source: TokenPair, target: TokenPair, direction: Direction, limit: int | None) -> Row:
    if direction == "d2q":
        return Row(source.document, target.query_text, direction, limit)
    return Row(source.query if direction == "q2d" else source.document, target.document_text, direction, limit)


def _target_tokens(rows: Sequence[Row]) -> dict[Direction, int]:
    totals = dict.fromkeys((row.direction for row in rows), 0)
    for row in rows:
        totals[row.direction] += row.targets
    return totals
