"""Sentence-transformers' sides of the benchmarks: its trainer and its ``encode``, on our exported model."""

import argparse
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from anchorembed.data.pairs import TextPair
from anchorembed.model.load import quiet
from anchorembed.recipe_schema import Lora
from anchorembed.train.contrastive_losses import SCALE

Example = dict[str, str]
_ENDLESS = 10**6  # steps; the process is ended before


class Training:
    """The trainer's loop in a thread, which gets a batch at a time; called with a batch of pairs, it makes one step.

    A step is what the loop does from fetching a batch to its ``on_step_end``: collating, which tokenises and pads,
    forward, backward, clipping, the fused AdamW and clearing gradients. The loop, the collator, the loss and the
    optimizer are the library's; only the data loader is replaced.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.batches: queue.Queue[list[Example]] = queue.Queue()
        self.answers: queue.Queue[float | Exception] = queue.Queue()
        self.threads: int = args.threads
        model = _load(args, folder)
        model.add_adapter(lora_config())
        self.temporary = tempfile.TemporaryDirectory()  # the trainer needs an output folder
        settings = trainer_settings(self.temporary.name, args.batch, _ENDLESS, use_cpu=True, seed=args.seed)
        loss = ranking_loss(model, args.mini_batch if args.cached else None)
        self.trainer = _FedTrainer(model=model, args=settings, loss=loss)
        self.trainer.feed = _Feed(self.batches)
        self.trainer.add_callback(_Report(self.trainer, self.answers))
        threading.Thread(target=self._train, daemon=True).start()

    def __call__(self, batch: Sequence[TextPair]) -> dict[str, Any]:
        """Give the loop a batch, and wait for the end of its step."""
        self.batches.put([{"anchor": pair.query, "positive": pair.positive} for pair in batch])
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return {"loss": answer}

    def _train(self) -> None:
        torch.set_num_threads(self.threads)  # each thread has its own setting
        try:
            self.trainer.train()
        except Exception as error:  # raised where the step is waited for
            self.answers.put(error)


class _Feed(IterableDataset[list[Example]]):
    """Batches from a queue, without end."""

    def __init__(self, batches: "queue.Queue[list[Example]]") -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Example]]:
        while True:
            yield self.batches.get()


class _FedTrainer(SentenceTransformerTrainer):
    """The trainer with batches from a queue; its collator tokenises a batch when the step fetches it."""

    feed: _Feed
    last_loss = 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.feed, batch_size=None, collate_fn=self.data_collator)

    def training_step(self, *values: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*values, **named)
        self.last_loss = float(loss)
        return loss


class _Report(TrainerCallback):
    """Put a step's loss in the queue of answers when the step ends."""

    def __init__(self, trainer: _FedTrainer, answers: "queue.Queue[float | Exception]") -> None:
        self.trainer, self.answers = trainer, answers

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.answers.put(self.trainer.last_loss)


def trainer_settings(
    folder: str, batch: int, steps: int, *, use_cpu: bool, seed: int
) -> SentenceTransformerTrainingArguments:
    """The trainer's defaults, in bfloat16, with Stage II's learning rate; nothing is saved, logged or reported."""
    return SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=use_cpu,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def lora_config() -> LoraConfig:
    """Stage II's adapters."""
    lora = Lora()
    return LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )


def ranking_loss(model: SentenceTransformer, mini_batch: int | None) -> nn.Module:
    """Its loss with in-batch negatives; with ``mini_batch`` texts at once, its cached one."""
    if mini_batch is not None:
        return CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=mini_batch)
    return MultipleNegativesRankingLoss(model, scale=SCALE)


def encode(
    args: argparse.Namespace, folder: Path, dtype: torch.dtype = torch.float32, backend: str = "torch"
) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Texts to unit vectors by its ``encode``, weights in ``dtype`` or in another backend's own."""
    options = {"dtype": dtype} if backend == "torch" else {"ov_config": {"INFERENCE_NUM_THREADS": str(args.threads)}}
    model = _load(args, folder, model_kwargs=options, backend=backend)
    return lambda texts: {"vectors": model.encode(list(texts), batch_size=args.batch, show_progress_bar=False)}


def _load(args: argparse.Namespace, folder: Path, **options: Any) -> SentenceTransformer:
    with quiet():
        model = SentenceTransformer(str(folder), device="cpu", **options)
    model.max_seq_length = args.cut
    return model
