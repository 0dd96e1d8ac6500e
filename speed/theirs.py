"""Sentence-transformers' sides of the comparisons: its own trainer and its own ``encode``, on our exported model."""

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


class Training:
    """The trainer's own loop in a thread, fed a batch at a time; called with a batch of pairs, it does one step.

    A step is what the loop does from taking up a batch to its ``on_step_end``: collating, which tokenises and pads,
    forward, backward, clipping, the fused AdamW and clearing gradients. The loop, the collator, the loss and the
    optimizer are the library's; only where its batches come from is ours.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.batches: queue.Queue[list[Example]] = queue.Queue()
        self.answers: queue.Queue[float | Exception] = queue.Queue()
        self.threads: int = args.threads
        model = _load(args, folder)
        model.add_adapter(_lora())
        self.temporary = tempfile.TemporaryDirectory()  # where it would write, if it wrote
        self.trainer = _Fed(model=model, args=_settings(args, self.temporary.name), loss=_loss(args, model))
        self.trainer.feed = _Feed(self.batches)
        self.trainer.add_callback(_Report(self.trainer, self.answers))
        threading.Thread(target=self._train, daemon=True).start()

    def __call__(self, batch: Sequence[TextPair]) -> dict[str, Any]:
        """Hand the loop a batch and wait until its step has ended."""
        self.batches.put([{"anchor": pair.query, "positive": pair.positive} for pair in batch])
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return {"loss": answer}

    def _train(self) -> None:
        torch.set_num_threads(self.threads)  # it is kept by thread
        try:
            self.trainer.train()
        except Exception as error:  # handed to whoever waits for the step
            self.answers.put(error)


class _Feed(IterableDataset[list[Example]]):
    """Batches as they are handed over, without end."""

    def __init__(self, batches: "queue.Queue[list[Example]]") -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Example]]:
        while True:
            yield self.batches.get()


class _Fed(SentenceTransformerTrainer):
    """The trainer with batches that are handed to it; its collator tokenises them when the step asks for them."""

    feed: _Feed
    last_loss = 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.feed, batch_size=None, collate_fn=self.data_collator)

    def training_step(self, *values: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*values, **named)
        self.last_loss = float(loss)
        return loss


class _Report(TrainerCallback):
    """Says that a step has ended."""

    def __init__(self, trainer: _Fed, answers: "queue.Queue[float | Exception]") -> None:
        self.trainer, self.answers = trainer, answers

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.answers.put(self.trainer.last_loss)


def _settings(args: argparse.Namespace, folder: str) -> SentenceTransformerTrainingArguments:
    """Its defaults, in bfloat16 on the CPU; nothing saved, logged or reported."""
    return SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=10**6,  # the feed decides when it is over
        per_device_train_batch_size=args.batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        seed=args.seed,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _lora() -> LoraConfig:
    lora = Lora()
    return LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )


def _loss(args: argparse.Namespace, model: SentenceTransformer) -> nn.Module:
    if args.cached:
        return CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=args.mini_batch)
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
