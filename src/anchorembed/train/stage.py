"""A stage of training: settings and a module in, a step's gradients, metrics and costs out.

Its classes are ``Reconstruction`` (Stage I, `reconstruct`) and ``Contrastive`` (Stage II, `contrast`). The loop, the
profile and the comparison use nothing else of a stage. The functions below work with any stage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from anchorembed.errors import InputError, extra
from anchorembed.model.adapters import adaptable, add_lora, not_adapted
from anchorembed.model.backbone import Backbone
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Data, Lora
from anchorembed.train.prepare import Prepared

StageName = Literal["reconstruct", "contrast"]
Metrics = dict[str, float]
Measured = dict[str, Tensor]  # metrics that are still on the device, as scalar tensors


@dataclass(frozen=True, slots=True)
class StepSize:
    """Largest sizes of a step, in tokens and texts; `memory_estimate` turns them into bytes.

    Attributes:
        longest: most tokens that cannot be split up: of a pair in Stage I, of a text in Stage II.
        most: tokens of the whole step.
        writes: whether the decoder writes targets, which takes logits.
        queries: queries that are compared at once.
        documents: documents that the queries are compared with.
        lora: settings of the adapters; None if the weights themselves train.
    """

    longest: int
    most: int
    writes: bool = False
    queries: int = 0
    documents: int = 0
    lora: Lora | None = None


@dataclass(frozen=True)
class Stage(ABC):
    """A stage of training, built from its settings; ``Any`` stands for its own settings and batches.

    Attributes:
        settings: the stage's section of the recipe.
        module: has the weights that train, wrapped if there are several processes.
        embedder: what is trained.
        budget: most tokens at once, unless one text or pair has more.
        unsynced: opens a context without gradient averaging between processes, for all parts of a step but the last.
    """

    settings: Any
    module: nn.Module
    embedder: Embedder
    budget: int
    unsynced: Callable[[], AbstractContextManager[object]] = nullcontext

    name: ClassVar[str]  # its key in a recipe, and its folder
    adapters_cure: ClassVar[str]  # of `check_stored`: what needs float32, and what to set

    # Building

    @classmethod
    def build(cls, embedder: Embedder, settings: Any, budget: int) -> Self:  # noqa: ANN401 - each stage has its own
        """Build the stage for ``embedder``, with at most ``budget`` tokens at once; adapters are added."""
        module = cls.trained_module(embedder, settings)
        if settings.recompute:
            embedder.backbone.recompute_layers()
        return cls(settings, module, embedder, budget)

    @staticmethod
    @abstractmethod
    def trained_module(embedder: Embedder, settings: Any) -> nn.Module:  # noqa: ANN401
        """The module whose trainable weights the stage trains; adapters are added."""

    @staticmethod
    @abstractmethod
    def step_size(settings: Any, data: Data) -> StepSize:  # noqa: ANN401
        """Largest sizes of a step, for the estimate of its memory."""

    @classmethod
    def check_stored(cls, settings: Any, stored: str) -> None:  # noqa: ANN401
        """Refuse to train weights that are not stored in float32, where small updates are lost; adapters are.

        Raises:
            InputError: naming the settings to change.
        """
        if stored != "float32" and settings.lora is None:
            raise InputError(f"model.weights: {stored} is for adapters, and {cls.adapters_cure.format(stored=stored)}")

    @classmethod
    def check(cls, settings: Any, prepared: Prepared) -> None:  # noqa: ANN401
        """Refuse settings that cannot work with these pairs and this model, before anything is trained.

        Raises:
            InputError: if the model has none of the modules that adapters are for.
        """
        if settings.lora is not None:
            adaptable(prepared.embedder.backbone.model, settings.lora.targets, f"{cls.name}.lora.targets")

    @staticmethod
    @abstractmethod
    def teaches(settings: Any, pairs: Sequence[TokenPair]) -> bool:  # noqa: ANN401
        """Whether a step of these pairs has a gradient."""

    # A step

    @property
    def hard_negatives(self) -> int:
        """Hard negatives of each pair that a step uses."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the stage computes."""
        return self.embedder.backbone.device

    @abstractmethod
    def make_batch(self, number: int, pairs: Sequence[TokenPair]) -> Any:  # noqa: ANN401
        """Lay out step ``number`` on the CPU and send it to the device."""

    @abstractmethod
    def run(self, batch: Any) -> Measured:  # noqa: ANN401
        """Accumulate the gradients of a batch, without waiting for the device."""

    # Held-out pairs

    @abstractmethod
    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Metrics of held-out pairs."""

    @abstractmethod
    def quality(self, metrics: Metrics) -> float | None:
        """The metric of a report by which the best evaluation is chosen; None if the report lacks it."""

    # Cost and warnings

    @abstractmethod
    def flops(self, number: int, pairs: Sequence[TokenPair]) -> float:
        """Model FLOPs of step ``number``; see `flops`."""

    def unused(self, prepared: Prepared) -> list[str]:
        """Sentences on parts of the pairs or of the model that these settings do not use."""
        backbone = self.embedder.backbone
        left_out = ", ".join(not_adapted(backbone.model) if backbone.peft else ())
        return [f"LoRA does not adapt {left_out}; {self.name}.lora.targets says what it adapts"] if left_out else []

    def verdict(self, log: Sequence[Metrics]) -> str:
        """A warning if a finished stage's log shows that training failed; else empty."""
        return ""


def batch_and_costs(stage: Stage, prepared: Prepared, number: int, indices: Sequence[int]) -> tuple[Any, Metrics]:
    """The batch of step ``number`` and its costs: the texts' tokens without template, and model FLOPs."""
    pairs = prepared.tokens(indices, stage.hard_negatives)
    tokens = sum(len(pair.query_text) + len(pair.document_text) for pair in pairs)
    costs = {"tokens": float(tokens), "flops": stage.flops(number, pairs)}
    if not stage.teaches(stage.settings, pairs):
        costs |= {"teaches_nothing": 1.0}
    return stage.make_batch(number, pairs), costs


def evaluation(stage: Stage, prepared: Prepared) -> Callable[[], Metrics]:
    """A function that measures held-out pairs and the tasks of ``evaluate_on``.

    Its ``quality``, by which the best evaluation is chosen, is the tasks' mean score, or without tasks `Stage.quality`.
    """
    held_out = prepared.tokens(prepared.split.held_out.tolist(), stage.hard_negatives)
    measure: Callable[[Embedder], Metrics] | None = None
    if stage.settings.evaluate_on:
        with extra("eval"):
            from anchorembed.evaluate.find import measure_on  # noqa: PLC0415 - an extra

        measure = measure_on(stage.settings.evaluate_on)

    def evaluate() -> Metrics:
        metrics = stage.report(held_out) if len(held_out) > 1 else {}
        if measure is not None:
            scores = measure(stage.embedder)
            return metrics | scores | {"quality": sum(scores.values()) / len(scores)}  # nan if a score is undefined
        quality = stage.quality(metrics)
        return metrics if quality is None else metrics | {"quality": quality}

    return evaluate


def add_adapters(backbone: Backbone, lora: Lora | None) -> None:
    """Freeze all weights and add adapters; with ``lora`` None, all weights train."""
    if lora is not None:
        add_lora(backbone, lora.rank, lora.alpha, lora.dropout, lora.targets)


def step(stage: Stage, number: int, pairs: Sequence[TokenPair]) -> Metrics:
    """Accumulate the gradient of the stage's loss over the pairs, and read its metrics back."""
    return read_back(stage.run(stage.make_batch(number, pairs)))


def read_back(measured: Measured) -> Metrics:
    """Metrics as numbers: the only time in a step that the CPU waits for the device."""
    values = torch.stack([value.detach().float().reshape(()) for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))
