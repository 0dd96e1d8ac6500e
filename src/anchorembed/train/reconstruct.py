"""Stage I: write each side of a pair from the other's anchor (EBQ2D, EBD2Q; Su et al., EMNLP 2025, section 3).

``make_batch`` does what the CPU can do beforehand (packing, targets, weights, masks) and sends it to the device;
``run`` only computes there and waits for nothing.

Axes: N texts to write, P positions that have a target, D directions, H hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from anchorembed.config import Data, Reconstruct
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch, by_length, micro_batches, pack, send
from anchorembed.model.tokens import TokenPair
from anchorembed.system.processes import processes, rank, shares, summed, summed_with_gradient, whole
from anchorembed.train.decoding import Decoding, centred, decoding, target_count
from anchorembed.train.flops import TRAINED, weight_count
from anchorembed.train.gradcache import cached_backward
from anchorembed.train.prepare import Prepared
from anchorembed.train.reconstruction_module import ReconstructionModule
from anchorembed.train.stage import Measured, Metrics, StepSize, read_back

Direction = Literal["q2d", "d2q", "d2d", "next_token"]  # the last two are controls of a comparison
DIRECTIONS: tuple[Direction, ...] = ("q2d", "d2q")
_FIRST = 4  # target tokens of a text whose gain is reported apart
_ALIKE = 0.95  # mean cosine of two anchors above which they have collapsed
_READ = 0.02  # nats a token: an anchor gain below it is noise


@dataclass(frozen=True, slots=True)
class Writing:
    """One text to write: from which templated ids (none for next tokens), which own tokens, which direction that is.

    ``limit`` is the most tokens of the text that are written; None for all.
    """

    source: list[int]
    text: list[int]
    direction: Direction
    limit: int | None = None

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

    micro_batches: list[MicroBatch]
    idle: int
    weights: dict[Direction, float]
    totals: dict[Direction, int]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Stage I on a step's pairs: L_I = w L_D2Q + (1 - w) L_Q2D, each over all target tokens of the step.

    Micro-batches and processes change nothing but memory. ``unsynced`` opens a context in which gradients stay in this
    process: all micro-batches but the last.
    """

    settings: Reconstruct
    module: nn.Module
    embedder: Embedder
    budget: int
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext

    name: ClassVar[str] = "reconstruct"

    # Building

    @classmethod
    def build(cls, embedder: Embedder, settings: Reconstruct, budget: int) -> Self:
        """Make the stage ready to train ``embedder``, at most ``budget`` tokens at once."""
        if settings.recompute:
            embedder.backbone.recompute_layers()
        return cls(settings, cls.trained_module(embedder, settings), embedder, budget)

    @staticmethod
    def trained_module(embedder: Embedder, settings: Reconstruct) -> nn.Module:
        """All weights, the head's among them."""
        return ReconstructionModule(embedder)

    @staticmethod
    def step_size(settings: Reconstruct, data: Data) -> StepSize:
        """What a step holds in memory: encoded and written tokens of the longest pairs."""
        directions = 2 if settings.directions == "both" else 1
        pair = directions * (data.query_tokens + data.document_tokens + 2)
        return StepSize(longest=pair, most=settings.batch_size * pair, writes=True)

    @staticmethod
    def check_stored(settings: Reconstruct, stored: str) -> None:
        """Refuse weights that are not stored in float32.

        Raises:
            InputError: naming what to change.
        """
        if stored != "float32":
            raise InputError(
                f"model.weights: {stored} is for adapters, and Stage I trains all weights, which need float32. Run "
                f"reconstruct with model.weights=float32, then contrast with {stored}; or leave Stage I out: "
                "reconstruct=null."
            )

    @staticmethod
    def check(settings: Reconstruct, prepared: Prepared) -> None:
        """All pairs and models serve."""

    @staticmethod
    def teaches(settings: Reconstruct, pairs: Sequence[TokenPair]) -> bool:
        """Whether two pairs have text on both sides, or one where a step has one."""
        return sum(bool(pair.query_text and pair.document_text) for pair in pairs) >= min(2, settings.batch_size)

    def with_module(self, module: nn.Module, unsynced: Callable[[], AbstractContextManager[object]] | None) -> Self:
        """The same with its module wrapped for several processes."""
        return replace(self, module=module, unsynced=unsynced or self.unsynced)

    def with_budget(self, budget: int) -> Self:
        """The same with another number of tokens at once."""
        return replace(self, budget=budget)

    # A step

    def make_batch(self, number: int, pairs: Sequence[TokenPair]) -> ReconstructionBatch:
        """Lay out step ``number`` and send it to the device."""
        weights = self.direction_weights(number)
        writings = self.writings(number, pairs)
        totals = _target_tokens([writing for of_pair in writings for writing in of_pair])
        per_token = {direction: weight / totals[direction] for direction, weight in weights.items()}
        runs = [self._micro_batches(part) for part in shares(writings)]
        idle = max(map(len, runs)) - len(runs[rank()])
        nothing = [self._micro_batch(writings[0], dict.fromkeys(weights, 0.0), is_idle=True) for _ in range(idle)]
        return ReconstructionBatch(
            nothing + [self._micro_batch(part, per_token) for part in runs[rank()]], idle, weights, totals
        )

    def direction_weights(self, number: int) -> dict[Direction, float]:
        """What each direction's loss weighs in step ``number``."""
        directions, weight = self.settings.directions, self.settings.d2q_weight
        if directions == "both":
            return {"q2d": 1 - weight, "d2q": weight}
        if directions == "alternate":
            return {DIRECTIONS[number % 2]: 1.0}
        return {directions: 1.0}

    def writings(self, number: int, pairs: Sequence[TokenPair]) -> list[list[Writing]]:
        """What step ``number`` writes, by pair."""
        directions = self.direction_weights(number)
        return [[writing for direction in directions for writing in self.of_pair(pair, direction)] for pair in pairs]

    def of_pair(self, pair: TokenPair, direction: Direction) -> list[Writing]:
        """What is written of a pair in a direction."""
        limit = self.settings.target_tokens
        if direction == "d2q":
            return [Writing(pair.document, pair.query_text, direction, limit)]
        return [Writing(pair.query, pair.document_text, direction, limit)]

    @property
    def hard_negatives(self) -> int:
        """None are used."""
        return 0

    @property
    def decodes(self) -> bool:
        """Whether the decoder's loss is trained; else the bag's alone."""
        return True

    def run(self, batch: ReconstructionBatch) -> Measured:
        """Backpropagate a step's micro-batches; returns the losses of all processes."""
        is_anchored = batch.micro_batches[0].sources is not None
        if self.settings.anchor == "raw" or not is_anchored:
            sums_2D = self._backward(batch)
        elif len(batch.micro_batches) == 1:
            sums_2D = self._backward(batch, centre=self._centring(batch.micro_batches[0].sides_N))
        else:
            sums_2D = self._cached_backward(batch)
        sums_2D = summed(sums_2D)
        measured: Measured = {}
        loss = torch.zeros((), device=self._device)
        for row, (direction, weight) in enumerate(batch.weights.items()):
            written, bag = (sums_2D[kind, row] / batch.totals[direction] for kind in (0, 1))
            loss = loss + weight * (written + self.settings.bag_weight * bag)
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
        sums_2D = torch.zeros(2, len(batch.weights), device=self._device)
        for number, micro in enumerate(batch.micro_batches):
            with nullcontext() if is_last and number + 1 == len(batch.micro_batches) else self.unsynced():
                loss, losses_2D = self._losses(micro, None if anchors is None else anchors[number], centre)
                (loss if processes() == 1 else loss * processes()).backward()
            if number >= batch.idle:
                sums_2D += losses_2D
        return sums_2D

    def _losses(
        self, micro: MicroBatch, anchors_NH: Tensor | None, centre: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and each direction's summed losses in nats, [2, D]: by decoding, and by the bag."""
        decode = self.decodes or micro.sources is None
        sources = micro.sources if anchors_NH is None else None
        loss, *losses = self.module(
            sources, micro.targets, micro.weights_P, anchors_NH, centre, self.settings.bag_weight, decode
        )
        return loss, torch.stack(losses) @ micro.masks_DP.T

    def _cached_backward(self, batch: ReconstructionBatch) -> Tensor:
        """The same where anchors depend on the whole step's, in the memory of one micro-batch, as GradCache does it.

        Encode all without a graph, write each micro-batch from its anchors, then encode each again with a graph and
        push its anchors' gradients through.
        """
        sides_N = torch.cat([micro.sides_N for micro in batch.micro_batches])
        sizes = [len(micro.sides_N) for micro in batch.micro_batches]
        sums: list[Tensor] = []

        def written(anchors_NH: Tensor) -> Tensor:
            """What has the gradient of the loss with respect to the anchors, through what they become."""
            centred_NH = self._centring(sides_N)(anchors_NH)
            leaves_NH = centred_NH.detach().requires_grad_()
            sums.append(self._backward(batch, leaves_NH.split(sizes), is_last=False))
            return (centred_NH * cast("Tensor", leaves_NH.grad)).sum()

        sources = [micro.sources for micro in batch.micro_batches]
        cached_backward(
            lambda packed: self.module(packed, None)[0], sources, written, self._device, unsynced=self.unsynced
        )
        return sums[0]

    def _centring(self, sides_N: Tensor) -> Callable[[Tensor], Tensor]:
        """What anchors go through before they enter the decoder."""
        length = whole(self.embedder.backbone.token_length())
        gradient_only = self.settings.anchor == "centred_gradient"
        return lambda anchors_NH: centred(anchors_NH, sides_N, length, summed_with_gradient, gradient_only)

    def _named(self, direction: Direction, written: Tensor, bag: Tensor) -> Measured:
        """A direction's two losses, of those that are trained."""
        is_anchored = direction != "next_token"
        losses = {f"loss_{direction}": written} if self.decodes or not is_anchored else {}
        return losses | ({f"loss_bag_{direction}": bag} if self.settings.bag_weight and is_anchored else {})

    def _micro_batches(self, writings: Sequence[list[Writing]]) -> list[list[Writing]]:
        """Pairs' writings in runs within the budget, pairs of like length together, longest first."""
        order, runs = by_length([sum(writing.cost for writing in of_pair) for of_pair in writings], self.budget)
        return [[writing for i in order[run.start : run.stop] for writing in writings[i]] for run in runs]

    def _micro_batch(
        self, writings: Sequence[Writing], per_token: dict[Direction, float], is_idle: bool = False
    ) -> MicroBatch:
        """Writings laid out on the device; each target token weighs what its direction's do."""
        is_anchored = all(writing.source for writing in writings)
        sources = pack([writing.source for writing in writings]) if is_anchored else None
        end_id, sink = self.embedder.pairs.end_id, self.settings.sink and is_anchored
        targets = decoding([writing.text for writing in writings], end_id, sink, writings[0].limit)
        weights_P = torch.tensor([per_token[writing.direction] for writing in writings])[targets.owners]
        masks_DN = torch.tensor([[float(writing.direction == name) for writing in writings] for name in per_token])
        sides_N = torch.tensor([-1 if is_idle else writing.side for writing in writings])
        return MicroBatch(sources, targets, weights_P, masks_DN[:, targets.owners], sides_N).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.embedder.backbone.device

    # Held-out pairs

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Loss and anchor gain of each direction on held-out pairs, in nats a token; how alike their anchors are.

        The gain is the loss with another pair's vector minus the loss with its own: how much of the text the decoder
        reads from the vector, beyond what it knows about the domain; ``gain_first_...`` of each text's first 4 tokens.
        Of the bag, if that is trained, too. Anchors as they are have a mean cosine and an effective rank: near 1 and
        small, they tell texts hardly apart. Centred anchors enter the decoder less the mean of the held-out ones.
        """
        metrics: Metrics = {}
        for direction in self.reported_directions():
            writings = [writing for pair in pairs for writing in self.of_pair(pair, direction)]
            runs = list(micro_batches([writing.cost for writing in writings], self.budget))
            batches = [self._micro_batch(writings[run.start : run.stop], {direction: 1.0}) for run in runs]
            anchors_NH = torch.cat([self.module(micro.sources, None)[0] for micro in batches])
            spread = _spread(anchors_NH)
            if self.settings.anchor != "raw":
                anchors_NH = self._centring(torch.cat([micro.sides_N for micro in batches]))(anchors_NH)
            right, other = (self._mean_losses(batches, anchors) for anchors in (anchors_NH, anchors_NH.roll(-1, 0)))
            gains = {name: other[name] - right[name] for name in right}
            metrics |= {f"held_out_{direction}": right["all"], f"gain_{direction}": gains["all"]}
            metrics |= {f"gain_first_{direction}": gains["first"]}
            metrics |= {f"{name}_{direction}": value for name, value in spread.items()}
            if self.settings.bag_weight:
                metrics |= {f"held_out_bag_{direction}": right["bag"], f"gain_bag_{direction}": gains["bag"]}
        return metrics

    def reported_directions(self) -> tuple[Direction, ...]:
        """Directions that a report measures: both, whichever are trained."""
        return DIRECTIONS

    def _mean_losses(self, batches: Sequence[MicroBatch], anchors_NH: Tensor) -> Metrics:
        """Mean losses of target tokens, in nats: of all, of each text's first 4, and by the bag."""
        sums_5 = torch.zeros(5, device=self._device)
        parts = anchors_NH.split([len(micro.sides_N) for micro in batches])
        before, bag_weight = int(self.settings.sink), self.settings.bag_weight
        for micro, anchors in zip(batches, parts, strict=True):
            targets = micro.targets
            _, losses_P, bags_P = self.module(None, targets, micro.weights_P, anchors, bag_weight=bag_weight)
            first_P = (targets.batch.positions[targets.predicting] < _FIRST + before).float()
            sums_5 += torch.stack(
                [losses_P.sum(), first_P @ losses_P, bags_P.sum(), micro.weights_P.sum(), first_P.sum()]
            )
        written, first, bag, tokens, early = sums_5.tolist()
        return {"all": written / tokens, "first": first / early, "bag": bag / tokens}

    def quality(self, metrics: Metrics) -> float | None:
        """The sum of both directions' anchor gains of what is trained: the decoder, the bag or both."""
        trained = {"gain": self.decodes, "gain_bag": self.settings.bag_weight > 0}
        names = [name for name, is_trained in trained.items() if is_trained]
        gains = [metrics[f"{name}_{side}"] for name in names for side in DIRECTIONS if f"{name}_{side}" in metrics]
        return sum(gains) if gains else None

    # What it costs, and what went wrong

    def flops(self, number: int, pairs: Sequence[TokenPair]) -> float:
        """Model FLOPs of step ``number``: encoding, decoding, and the head once a target token and a bag."""
        writings = [writing for of_pair in self.writings(number, pairs) for writing in of_pair]
        encoded = sum(len(writing.source) for writing in writings)
        decoded = [writing for writing in writings if self.decodes or not writing.source]
        written = sum(writing.targets for writing in decoded)
        sinks = sum(self.settings.sink and bool(writing.source) for writing in decoded)
        bags = sum(self.settings.bag_weight > 0 and bool(writing.source) for writing in writings)
        backbone = self.embedder.backbone
        heads = backbone.head.weight.numel() * (written + bags)
        return float(TRAINED * (weight_count(backbone) * (encoded + sinks + written) + heads))

    def unused(self, prepared: Prepared) -> list[str]:
        """Nothing is left unused."""
        return []

    def verdict(self, log: Sequence[Metrics]) -> str:
        """Say so where anchors are all alike at the end and the decoder does not read them."""
        last = next((entry for entry in reversed(log) if "cosine_q2d" in entry), None)
        if last is None:
            return ""
        cosine, gain = (max(last[f"{name}_{direction}"] for direction in DIRECTIONS) for name in ("cosine", "gain"))
        if cosine <= _ALIKE or gain >= _READ:
            return ""
        return (
            f"anchors are nearly alike (mean cosine {cosine:.2f}) and the decoder reads nothing from them "
            f"(anchor gain {gain:.3f} nats a token). Stage II is likely better from the base model: reconstruct=null."
        )


def _spread(anchors_NH: Tensor) -> Metrics:
    """Mean cosine of two anchors; effective rank, e to the entropy of the spectrum (Roy and Vetterli, 2007)."""
    units_NH = nn.functional.normalize(anchors_NH, dim=-1)
    count = len(units_NH)
    cosine = (units_NH.sum(0).square().sum() - count) / (count * (count - 1))
    shares = nn.functional.normalize(torch.linalg.svdvals(units_NH), p=1, dim=0)
    return read_back({"cosine": cosine, "rank": torch.special.entr(shares).sum().exp()})


def _target_tokens(writings: Sequence[Writing]) -> dict[Direction, int]:
    totals = dict.fromkeys((writing.direction for writing in writings), 0)
    for writing in writings:
        totals[writing.direction] += writing.targets
    return totals
