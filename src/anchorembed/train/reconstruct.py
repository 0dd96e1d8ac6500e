"""Stage I: write each side of a pair from the other's anchor (EBQ2D, EBD2Q; Su et al., EMNLP 2025, section 3).

``make_batch`` prepares a batch on the CPU (packing, targets, weights, masks) and sends it to the device. ``run`` only
computes there and waits for nothing.

Axes: N texts to write, P positions that have a target, D directions, H hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import by_length, micro_batches, send
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Data, Reconstruct
from anchorembed.system.processes import processes, rank, shares, summed
from anchorembed.train.anchor_choice_loss import CHOICES
from anchorembed.train.anchor_gain import anchor_gain, collapsed
from anchorembed.train.anchors import decoder_anchors
from anchorembed.train.contrast import excluded_documents
from anchorembed.train.flops import flops_a_weight, weight_count
from anchorembed.train.gradcache import GradCache
from anchorembed.train.reconstruction_batch import (
    DIRECTIONS,
    Direction,
    MicroBatch,
    ReconstructionBatch,
    Writing,
    lay_out,
)
from anchorembed.train.reconstruction_loss import ReconstructionLoss
from anchorembed.train.stage import Measured, Metrics, Stage, StepSize, add_adapters


@dataclass(frozen=True)
class Reconstruction(Stage):
    """Stage I on a step's pairs: L_I = w L_D2Q + (1 - w) L_Q2D, each over all target tokens of the step.

    The number of micro-batches and of processes changes no result.
    """

    settings: Reconstruct

    name: ClassVar[str] = "reconstruct"
    adapters_cure: ClassVar[str] = (
        "Stage I trains all weights, which need float32. Train adapters: reconstruct.lora={{}}. Or run reconstruct "
        "with model.weights=float32, then contrast with {stored}; or leave Stage I out: reconstruct=null."
    )

    # Building

    @staticmethod
    def trained_module(embedder: Embedder, settings: Reconstruct) -> nn.Module:
        """The module of both passes and the loss; either adapters train, or all weights, the head's among them."""
        add_adapters(embedder.backbone, settings.lora)
        return ReconstructionLoss(embedder, settings.bag_weight)

    @staticmethod
    def step_size(settings: Reconstruct, data: Data) -> StepSize:
        """Encoded and written tokens of a step of the longest pairs."""
        directions, written = (2 if settings.directions == "both" else 1), data.query_tokens + data.document_tokens + 2
        pair = directions * written
        if settings.read_weight is not None:
            pair += (CHOICES - 1) * min(pair, 2 * directions * (settings.target_tokens or pair))
        return StepSize(longest=pair, most=settings.batch_size * pair, writes=True, lora=settings.lora)

    @staticmethod
    def teaches(settings: Reconstruct, pairs: Sequence[TokenPair]) -> bool:
        """Whether at least two pairs have text on both sides, or one if ``batch_size`` is 1."""
        return sum(bool(pair.query_text and pair.document_text) for pair in pairs) >= min(2, settings.batch_size)

    # A step

    def make_batch(self, number: int, pairs: Sequence[TokenPair]) -> ReconstructionBatch:
        """Lay out step ``number`` and send it to the device."""
        weights = self.direction_weights(number)
        writings = self.writings(number, pairs)
        targets = [(writing.direction, writing.targets) for writing in chain.from_iterable(writings)]
        totals = {name: sum(count for direction, count in targets if direction == name) for name in weights}
        per_token = {direction: weight / totals[direction] for direction, weight in weights.items()}
        runs = [self._micro_batches(part) for part in shares(writings)]
        idle = max(map(len, runs)) - len(runs[rank()])
        choosing = (self.settings.read_weight or 0.0) / len(pairs)
        per_text = {direction: choosing * weight for direction, weight in weights.items()}
        zeros = dict.fromkeys(weights, 0.0)
        micro_batches = [self._laid_out(writings[0], zeros, zeros, is_idle=True) for _ in range(idle)]
        micro_batches += [self._laid_out(part, per_token, per_text) for part in runs[rank()]]
        anchor, contrast_weight = self.settings.anchor, self.settings.contrast_weight
        excluded_QD = None if contrast_weight is None else send(excluded_documents(pairs, 0), self.device)
        return ReconstructionBatch(
            micro_batches, idle, len(pairs), weights, totals, anchor, excluded_QD, contrast_weight or 0.0
        )

    def direction_weights(self, number: int) -> dict[Direction, float]:
        """Weight of each direction's loss in step ``number``."""
        directions, weight = self.settings.directions, self.settings.d2q_weight
        if directions == "both":
            return {"q2d": 1 - weight, "d2q": weight}
        if directions == "alternate":
            return {DIRECTIONS[number % 2]: 1.0}
        return {directions: 1.0}

    def writings(self, number: int, pairs: Sequence[TokenPair]) -> list[list[Writing]]:
        """Texts that step ``number`` writes, by pair."""
        directions = self.direction_weights(number)
        writings = [
            [writing for direction in directions for writing in self.of_pair(pair, direction)] for pair in pairs
        ]
        if "next_token" in directions:
            return writings
        stride, total = len(directions), len(directions) * len(pairs)
        choices = range(1 if self.settings.read_weight is None else min(CHOICES, len(pairs)))
        rows = (tuple((row + stride * choice) % total for choice in choices) for row in range(total))
        return [[replace(writing, rows=next(rows)) for writing in pair_writings] for pair_writings in writings]

    def of_pair(self, pair: TokenPair, direction: Direction) -> list[Writing]:
        """Texts of a pair that are written in a direction."""
        limit = self.settings.target_tokens
        if direction == "d2q":
            return [Writing(pair.document, pair.query_text, direction, limit)]
        return [Writing(pair.query, pair.document_text, direction, limit)]

    @property
    def decodes(self) -> bool:
        """Whether the decoder's loss is trained: it is, but for a control of a comparison (`compare.controls`)."""
        return True

    def run(self, batch: ReconstructionBatch) -> Measured:
        """Backpropagate a step's micro-batches; returns the losses of all processes."""
        micro = batch.micro_batches[0]
        is_centred = micro.sources is not None and batch.anchor != "raw"
        needs_all_anchors = is_centred or micro.choices > 1 or batch.excluded_QD is not None
        by_cache = needs_all_anchors and len(batch.micro_batches) > 1
        sums_3D, contrast = self._cached_backward(batch) if by_cache else self._backward(batch)
        sums_3D = summed(sums_3D)
        measured: Measured = {}
        loss = torch.zeros((), device=self.device)
        for row, (direction, weight) in enumerate(batch.weights.items()):
            for sums_D, (name, loss_weight) in zip(sums_3D, self._loss_weights(direction).items(), strict=False):
                if loss_weight:
                    value = sums_D[row] / (batch.pairs if name == "read_" else batch.totals[direction])
                    loss = loss + weight * loss_weight * value
                    measured[f"loss_{name}{direction}"] = value
        if batch.excluded_QD is not None:
            loss = loss + contrast.detach()
            measured["loss_contrast"] = contrast / batch.contrast_weight
        return {"loss": loss, **measured}

    def _backward(self, batch: ReconstructionBatch, anchors: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Backpropagate each micro-batch, from its sources or from given anchors.

        Returns this process's losses, [3, D] (decoding, bag, choosing), summed in nats, and the contrastive loss of the
        anchors, of all processes.
        """
        sums_3D = torch.zeros(3, len(batch.weights), device=self.device)
        step = batch if len(batch.micro_batches) == 1 else None
        for number, micro in enumerate(batch.micro_batches):
            is_last = not anchors and number + 1 == len(batch.micro_batches)
            with nullcontext() if is_last else self.unsynced():
                anchors_NH = anchors[number] if anchors else None
                decode = self.decodes or micro.sources is None
                loss, losses_3P, contrast = self.module(micro, anchors_NH, step, decode=decode)
                torch.stack([loss * processes(), contrast]).sum().backward()
            if number >= batch.idle:
                sums_3D += losses_3P @ micro.masks_DP.T
        return sums_3D, contrast

    def _cached_backward(self, batch: ReconstructionBatch) -> tuple[Tensor, Tensor]:
        """As `_backward`, where anchors depend on all anchors of the step, in one micro-batch's memory (`gradcache`).

        Encode all without a graph, write each micro-batch from its anchors, then encode each again with a graph and
        push its anchors' gradients through.
        """
        cache = GradCache(lambda micro: self.module(micro, encode_only=True)[0], batch.micro_batches, self.device)
        parts, contrast = decoder_anchors(batch, cache.vectors_NH, self.embedder.backbone)
        leaves = [part.detach().requires_grad_() for part in parts]
        sums_3D, _ = self._backward(batch, leaves)
        # the gradient of this sum with respect to the anchors is the loss's
        terms = [(part * cast("Tensor", leaf.grad)).sum() for part, leaf in zip(parts, leaves, strict=True)]
        cache.backward(torch.stack([*terms, contrast]).sum(), self.unsynced)
        return sums_3D, contrast

    def _loss_weights(self, direction: Direction) -> dict[str, float]:
        """Weights of a direction's losses (decoding, bag, choosing), by name; 0 for those that are not trained."""
        if direction == "next_token":
            return {"": 1.0}
        return {"": float(self.decodes), "bag_": self.settings.bag_weight, "read_": self.settings.read_weight or 0.0}

    def _micro_batches(self, writings: Sequence[list[Writing]]) -> list[list[Writing]]:
        """The writings in micro-batches within the budget: pairs of similar length together, longest first."""
        order, runs = by_length(
            [sum(writing.cost for writing in pair_writings) for pair_writings in writings], self.budget
        )
        return [[writing for i in order[run.start : run.stop] for writing in writings[i]] for run in runs]

    def _laid_out(
        self,
        writings: Sequence[Writing],
        per_token: Mapping[Direction, float],
        per_text: Mapping[Direction, float],
        is_idle: bool = False,
    ) -> MicroBatch:
        """Lay out writings and send them to the device."""
        end_id, sink = self.embedder.pairs.end_id, self.settings.sink
        return lay_out(writings, per_token, per_text, end_id, sink, is_idle).to(self.device)

    # Held-out pairs

    @torch.no_grad()
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Losses and anchor gains of each direction on held-out pairs, in nats per token; how alike their anchors are.

        The gain is the loss with another pair's anchor minus the loss with the text's own: how much of the text the
        decoder reads from the anchor, beyond what it knows about the domain. ``gain_first_...`` is that of each text's
        first 4 tokens, ``gain_bag_...`` the bag's, if it is trained. If the mean cosine of the uncentred anchors is
        near 1 and their effective rank small, they hardly tell texts apart. Centring is by the held-out anchors' mean.
        """
        metrics: Metrics = {}
        for direction in self.reported_directions():
            writings = [writing for pair in pairs for writing in self.of_pair(pair, direction)]
            runs = list(micro_batches([writing.cost for writing in writings], self.budget))
            weights = {direction: 1.0}
            batches = [self._laid_out(writings[run.start : run.stop], weights, weights) for run in runs]
            held_out = ReconstructionBatch(batches, 0, len(pairs), weights, {}, self.settings.anchor)
            gains = anchor_gain(self.module, held_out, self.embedder.backbone, self.settings.bag_weight)
            metrics |= {f"{name}_{direction}": value for name, value in gains.items()}
        return metrics

    def reported_directions(self) -> tuple[Direction, ...]:
        """Directions that a report measures: both, even if one is trained."""
        return DIRECTIONS

    def quality(self, metrics: Metrics) -> float | None:
        """The sum of both directions' anchor gains: of the decoder, of the bag, or of both, as they are trained."""
        trained = {
            "gain": self.decodes or self.settings.read_weight is not None,
            "gain_bag": self.settings.bag_weight > 0,
        }
        names = [name for name, is_trained in trained.items() if is_trained]
        gains = [metrics[f"{name}_{side}"] for name in names for side in DIRECTIONS if f"{name}_{side}" in metrics]
        return sum(gains) if gains else None

    # Cost and warnings

    def flops(self, number: int, pairs: Sequence[TokenPair]) -> float:
        """Model FLOPs of step ``number``: encoding, decoding, and the head once for each target token and each bag."""
        writings = list(chain.from_iterable(self.writings(number, pairs)))
        encoded = sum(len(writing.source) for writing in writings)
        decodes = self.decodes or self.settings.read_weight is not None
        decoded = [writing for writing in writings if decodes or not writing.source]
        written = sum(writing.targets * len(writing.rows) for writing in decoded)
        sinks = sum(len(writing.rows) for writing in decoded if self.settings.sink and writing.source)
        bags = sum(self.settings.bag_weight > 0 and bool(writing.source) for writing in writings)
        backbone = self.embedder.backbone
        heads = backbone.head.weight.numel() * (written + bags)
        return float(flops_a_weight(backbone) * (weight_count(backbone) * (encoded + sinks + written) + heads))

    def verdict(self, log: Sequence[Metrics]) -> str:
        """A warning if at the end anchors are all alike and the decoder does not read them."""
        return collapsed(log)
