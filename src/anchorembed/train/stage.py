"""What a training stage is: settings and a module in, a step's gradients, metrics and costs out.

``Reconstruction`` (Stage I, `reconstruct`) and ``Contrastive`` (Stage II, `contrast`) are the two there are. The loop,
the profile and the comparison know nothing of a stage but what is here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from anchorembed.config import Data, Lora
from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import micro_batches
from anchorembed.model.tokens import TokenPair
from anchorembed.train.prepare import Prepared

StageName = Literal["reconstruct", "contrast"]
Metrics = dict[str, float]
Measured = dict[str, Tensor]  # metrics that still are on the device, scalars


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step holds in memory at most, in tokens and texts; `memory_estimate` turns it into bytes.

    Attributes:
        longest: tokens that cannot be split up: those of a pair in Stage I, of a text in Stage II.
        most: tokens of the whole step.
        writes: whether targets are written, which takes logits.
        queries: queries whose similarities exist at once.
        documents: documents they are compared with.
        lora: adapters, where the weights themselves do not train.
    """

    longest: int
    most: int
    writes: bool = False
    queries: int = 0
    documents: int = 0
    lora: Lora | None = None


class Stage(Protocol):
    """A stage of training, built from its settings; ``Any`` stands for its own settings and batches."""

    name: ClassVar[str]  # its key in a recipe, and its folder

    @property
    def settings(self) -> Any:  # noqa: ANN401 - each stage has its own
        """The stage's section of the recipe."""

    @property
    def module(self) -> nn.Module:
        """What holds the weights that train; in several processes, what wraps it."""

    @property
    def embedder(self) -> Embedder:
        """What is trained."""

    @property
    def hard_negatives(self) -> int:
        """Hard negatives of each pair that a step uses."""

    @classmethod
    def build(cls, embedder: Embedder, settings: Any, budget: int) -> Self:  # noqa: ANN401
        """Make the stage ready to train ``embedder``, at most ``budget`` tokens at once; adapters are added."""

    @staticmethod
    def trained_module(embedder: Embedder, settings: Any) -> nn.Module:  # noqa: ANN401
        """The module whose trainable weights the stage trains; adapters are added."""

    @staticmethod
    def step_size(settings: Any, data: Data) -> StepSize:  # noqa: ANN401
        """What a step holds in memory."""

    @staticmethod
    def check_stored(settings: Any, stored: str) -> None:  # noqa: ANN401
        """Refuse weights that are not stored in float32 where the stage trains them: small updates would be lost."""

    @staticmethod
    def check(settings: Any, prepared: Prepared) -> None:  # noqa: ANN401
        """Refuse settings that cannot work with these pairs and this model, before anything is trained."""

    @staticmethod
    def teaches(settings: Any, pairs: Sequence[TokenPair]) -> bool:  # noqa: ANN401
        """Whether a step of these pairs has anything to learn from."""

    def with_module(self, module: nn.Module, unsynced: Callable[[], AbstractContextManager[object]] | None) -> Self:
        """The same with its module wrapped for several processes; see ``unsynced`` of `gradcache.cached_backward`."""

    def with_budget(self, budget: int) -> Self:
        """The same with another number of tokens at once."""

    def make_batch(self, number: int, pairs: Sequence[TokenPair]) -> Any:  # noqa: ANN401
        """Lay out step ``number`` on the CPU and send it to the device."""

    def run(self, batch: Any) -> Measured:  # noqa: ANN401
        """Accumulate the gradients of what was laid out; waits for nothing."""

    def report(self, pairs: Sequence[TokenPair]) -> Metrics:
        """Measure held-out pairs."""

    def quality(self, metrics: Metrics) -> float | None:
        """What the best evaluation is chosen by, from a report; None where it has not got it."""

    def flops(self, number: int, pairs: Sequence[TokenPair]) -> float:
        """Model FLOPs of step ``number``; see `flops`."""

    def unused(self, prepared: Prepared) -> list[str]:
        """Sentences on what pairs or model have that the settings leave unused."""

    def verdict(self, log: Sequence[Metrics]) -> str:
        """A sentence on a finished stage's log where something is wrong with what it trained; else empty."""


AnyStage = TypeVar("AnyStage", bound=Stage)


def step(stage: Stage, number: int, pairs: Sequence[TokenPair]) -> Metrics:
    """Accumulate the gradient of the stage's loss over the pairs, and read its metrics back."""
    return read_back(stage.run(stage.make_batch(number, pairs)))


def read_back(measured: Measured) -> Metrics:
    """Metrics as numbers: the one time in a step that the CPU waits for the device."""
    if not measured:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def by_length(costs: Sequence[int], budget: int) -> tuple[list[int], list[range]]:
    """Items by cost, highest first, and runs of that order within the budget.

    Like lengths together make few and large buckets of attention.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    return order, list(micro_batches([costs[i] for i in order], budget))
