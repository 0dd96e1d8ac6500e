"""Speed and parity of both stages on one GPU, and of sentence-transformers' trainer: a JSON line for each result.

    python3 speed/gpu.py --out DIR --seconds 240      # on a GPU; needs no network and no files
    python3 speed/gpu.py --parts compare --data DATA --results DIR --seconds 430   # the comparison, on real pairs
    python3 speed/gpu.py --tiny --out DIR             # every part but the comparison at toy size, on a CPU

Weights and tokens are random, in the shapes of real models and the lengths of short search texts: templated queries of
about 24 tokens, at most 32, documents of about 100, at most 128. A part that fails is recorded with its error, and the
next one starts. No part starts with too little time left. Lines are printed and appended to DIR/gpu.jsonl. The
comparison is `anchorembed compare` with recipes/compare-gpu.yaml, which is asked to stop in time; finished cells stay
in the results folder and are not run again.
"""

import argparse
import gc
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from anchorembed.data.pairs import TextPair
from anchorembed.model.adapters import add_lora
from anchorembed.model.backbone import Backbone
from anchorembed.model.check_packed_loss import check_reproduced, measure_scales, own_logits
from anchorembed.model.choose_attention import use_varlen
from anchorembed.model.compile_layers import compile_layers
from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import PackedBatch, pack
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Contrast, Lora, Reconstruct
from anchorembed.system.device import autocast
from anchorembed.train.contrast import Contrastive
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.gradcache import GradCache
from anchorembed.train.loop import one_ahead
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import Stage, read_back, step

Figures = dict[str, Any]
PARTS = ("machine", "parity", "syncs", "stage1", "stage2", "theirs", "replay")
_RECIPE = Path(__file__).parents[1] / "recipes" / "compare-gpu.yaml"
_STOP_SECONDS = 40  # for a comparison to write its checkpoint
CONTRAST = Contrast(hard_negatives=0)
LORA = Lora()
MAX_WORDS = 4096  # tokens that texts are drawn from, at most
END, FIRST = 2, 3  # ids of the end token and of the first token that texts are drawn from
HEADER = list(range(FIRST, FIRST + 10))


def _llama(hidden: int, inner: int, layers: int, heads: int, key_heads: int, size: int, words: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_sizes(hidden, inner, layers, heads, key_heads, size, words)))


def _qwen3(hidden: int, inner: int, layers: int, heads: int, key_heads: int, size: int, words: int) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(hidden, inner, layers, heads, key_heads, size, words)))


def _sizes(hidden: int, inner: int, layers: int, heads: int, key_heads: int, size: int, words: int) -> Figures:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": size,
        "vocab_size": words,
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "smollm2-135m": lambda: _llama(576, 1536, 30, 9, 3, 64, 49152),
    "qwen3-0.6b": lambda: _qwen3(1024, 3072, 28, 16, 8, 128, 151936),
    "llama-1b": lambda: _llama(2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": lambda: _llama(64, 128, 2, 4, 2, 16, 512),
}
VOCABULARY = {"smollm2-135m": 49152, "qwen3-0.6b": 151936, "llama-1b": 128256, "tiny": 512}
BUDGETS = {
    "smollm2-135m": (65536, 32768, 16384),
    "qwen3-0.6b": (32768, 16384),
    "llama-1b": (16384, 32768),  # the larger may not fit 80 GB
    "tiny": (256, 512),
}


# --- Texts -----------------------------------------------------------------------------------------------------------


def draw_pairs(count: int, words: int, seed: int = 0) -> list[TokenPair]:
    """Pairs of random tokens in a template: a header of 10 tokens before each text, and the end token after it."""
    rng = random.Random(seed)

    def text(mean: float, spread: float, most: int) -> list[int]:
        length = min(max(3, round(rng.gauss(mean, spread))), most - len(HEADER) - 1)
        return [rng.randrange(FIRST, min(words, MAX_WORDS)) for _ in range(length)]

    drawn = ((text(13, 5, 32), text(92, 25, 128)) for _ in range(count))
    return [_templated(query, document) for query, document in drawn]


def _templated(query: list[int], document: list[int]) -> TokenPair:
    return TokenPair([*HEADER, *query, END], [*HEADER, *document, END], (), query, document, TextPair("", ""))


def token_count(pairs: Sequence[TokenPair]) -> int:
    """Tokens of both templated sides."""
    return sum(len(pair.query) + len(pair.document) for pair in pairs)


def as_text(ids: Sequence[int]) -> str:
    """A text that ``word_tokenizer`` turns into these ids."""
    return " ".join(f"w{number}" for number in ids)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words ``w0``, ``w1`` and so on: ``w0`` pads."""
    backend = Tokenizer(WordLevel({f"w{number}": number for number in range(min(words, MAX_WORDS))}, unk_token="w1"))  # noqa: S106 - no password
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "w0", "unk_token": "w1", "eos_token": f"w{END}"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


# --- Stages with random weights --------------------------------------------------------------------------------


class BareEmbedder(nn.Module):
    """The parts of an embedder that the stages use: no tokenizer, no files."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone, self.dtype = backbone, dtype
        self.pairs = SimpleNamespace(end_id=END)

    forward = Embedder.forward


class Training:
    """A stage with its optimizer; ``step`` does with a batch what the training loop does."""

    def __init__(self, stage: Stage) -> None:
        self.module, self.stage = stage.module.train(), stage
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.module, stage.settings)

    def step(self, batch: Any, before_read_back: Callable[[], None] = lambda: None) -> Figures:
        """Gradients, clipping, metrics, update."""
        measured = self.stage.run(batch)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        before_read_back()
        metrics = read_back(measured | {"gradient_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return metrics

    def drop_gradients(self) -> None:
        """Free the gradients' memory."""
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the measured steps.

    Attributes:
        seconds: of a step.
        issue_seconds: until the CPU has issued a step's work to the GPU.
        first_seconds: of the first step, which is not measured.
        peak_gb: largest memory.
    """

    seconds: float
    issue_seconds: float
    first_seconds: float
    peak_gb: float


class Runner:
    """Runs parts in the time left, and records their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.started, self.options, self.tiny = time.monotonic(), options, options.tiny
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        self.warmup_steps, self.measured_steps = (1, 2) if self.tiny else (2, 5)
        self.peak_flops = 1.0  # FLOP/s, measured by the part machine
        self.held_gb = 0.0
        self.lines: list[Figures] = []
        options.out.mkdir(parents=True, exist_ok=True)
        self.file = (options.out / "gpu.jsonl").open("a", encoding="utf-8")

    def seconds_left(self) -> float:
        """Seconds until no part may run any more."""
        return self.options.seconds - (time.monotonic() - self.started)

    def record(self, what: str, **figures: Any) -> None:
        """Print a line and append it to the file."""
        self.lines.append({"what": what, "at": round(time.monotonic() - self.started, 1), **figures})
        line = json.dumps(self.lines[-1])
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def run_part(self, what: str, need: float, work: Callable[[], None], **named: Any) -> bool:
        """Run a part if ``need`` seconds are left; an error is recorded. Returns whether it ran without error."""
        if self.seconds_left() < need and not self.tiny:
            self.record(what, **named, skipped=f"{self.seconds_left():.0f} s left, {need:.0f} s needed")
            return False
        try:
            work()
        except Exception as error:  # whatever a part raises is recorded
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error)[:600]}"
            self.record(what, **named, failed=reason, place=f"{frame.filename}:{frame.lineno}")
            succeeded = False
        else:
            succeeded = True
        self.free()
        return succeeded

    def free(self) -> None:
        """Free unused memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Measure the largest memory from here on; ``held_gb`` is what is allocated already."""
        if self.cuda:
            self.held_gb = round(torch.cuda.memory_allocated() / 1e9, 2)
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """The largest memory since `reset_peak`."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else 0.0

    def model(self, name: str) -> PreTrainedModel:
        """Random weights in float32, on the device."""
        torch.manual_seed(0)
        with self.device:
            return SHAPES[name]().float().to(self.device)

    def backbone(self, name: str) -> Backbone:
        """A backbone with random weights, on the device, with the varlen kernel."""
        backbone = Backbone(self.model(name))
        self.varlen(backbone)
        return backbone

    def varlen(self, backbone: Backbone) -> None:
        """Use the varlen kernel for attention; on a CPU the one of `register_cpu_kernels`."""
        if self.cuda:
            use_varlen(backbone, self.dtype)
        else:
            backbone.varlen = True

    def compile(self, backbone: Backbone) -> float:
        """Compile the layers; returns the seconds that took."""
        began = time.perf_counter()
        if not compile_layers(backbone, self.dtype, backend="inductor" if self.cuda else "aot_eager"):
            self.record("compiling", failed="compile_layers returned False: see its warning")
        self.wait()
        return round(time.perf_counter() - began, 1)

    def stage1(self, backbone: Backbone, budget: int, dtype: torch.dtype | None = None) -> Training:
        """Stage I, both directions, all weights."""
        bare = BareEmbedder(backbone, dtype or self.dtype)
        return Training(Reconstruction.build(bare, Reconstruct(sink=False), budget))  # type: ignore[arg-type]

    def stage2(self, backbone: Backbone, budget: int) -> Training:
        """Stage II with LoRA."""
        stage = Contrastive.build(BareEmbedder(backbone, self.dtype), CONTRAST, budget)  # type: ignore[arg-type]
        backbone.to(self.device)
        return Training(stage)

    def timed(self, work: Callable[[], object]) -> float:
        """Median seconds of a small piece of work."""
        seconds = []
        for _ in range(self.warmup_steps + self.measured_steps):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[self.warmup_steps :])

    def steps(self, training: Training, prepare: Callable[[int], Any]) -> Measured:
        """Make steps as the loop does: a thread lays out the next one, and the GPU is waited for only at each end."""
        seconds, issue_seconds = [], []
        self.reset_peak()
        order = ((number, [number]) for number in range(self.warmup_steps + self.measured_steps))
        began = time.perf_counter()
        for _, _, laid_out in one_ahead(lambda number, _: (prepare(number), {}), order):
            batch, _ = laid_out.result()
            training.step(batch, lambda began=began: issue_seconds.append(time.perf_counter() - began))
            self.wait()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        return Measured(
            statistics.median(seconds[self.warmup_steps :]),
            statistics.median(issue_seconds[self.warmup_steps :]),
            seconds[0],
            self.peak_gb(),
        )


# --- 1. The machine --------------------------------------------------------------------------------------------------


def machine(runner: Runner) -> None:
    """Peak rates of a matrix product and of a copy."""
    size = 256 if runner.tiny else 8192
    a, b = (torch.randn(size, size, device=runner.device, dtype=torch.bfloat16) for _ in range(2))
    runner.peak_flops = 2 * size**3 / runner.timed(lambda: a @ b)
    source = torch.randn(size * size * 4, device=runner.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / runner.timed(lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if runner.cuda else "cpu"
    speed = {"tflops": round(runner.peak_flops / 1e12, 2), "copy_gb_s": round(copied / 1e9, 1)}
    runner.record("machine", name=name, torch=torch.__version__, **speed, cpus=os.cpu_count())


# --- 2. Parity -------------------------------------------------------------------------------------------------------


class Parity:
    """Packed, compiled and bfloat16 against padded float32, on one model."""

    def __init__(self, runner: Runner, compared: bool = True) -> None:
        self.runner, self.name = runner, runner.options.models[0]
        torch.backends.cuda.matmul.allow_tf32 = False
        model = runner.model(self.name).eval()
        self.pairs = draw_pairs(4 if runner.tiny else 64, model.config.vocab_size, seed=1)
        self.texts = [pair.document for pair in self.pairs]
        self.own_states = self._own_states(model) if compared else torch.empty(0)
        self.backbone = Backbone(model)
        self.budget = 10**9 if runner.cuda else 10**4

    def run(self) -> None:
        """Run all parts; `float32` first, as the others compare with it."""
        runner = self.runner
        for need, what in (
            (20.0, self.float32),
            (40.0, self.bfloat16),
            (10.0, self.company),
            (10.0, self.head),
        ):
            runner.run_part(f"parity {what.__name__}", need, what, model=self.name)

    @torch.no_grad()
    def _own_states(self, model: PreTrainedModel) -> Tensor:
        """Final states by the model's own forward pass on padded texts, those of padding left out."""
        model.set_attn_implementation("sdpa")
        longest = max(map(len, self.texts))
        ids = torch.tensor([text + [END] * (longest - len(text)) for text in self.texts], device=self.runner.device)
        lengths = torch.tensor([len(text) for text in self.texts], device=self.runner.device)
        mask = torch.arange(longest, device=self.runner.device) < lengths[:, None]
        states = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states[mask].float()

    def _states(self, dtype: torch.dtype, texts: Sequence[list[int]]) -> tuple[Tensor, PackedBatch]:
        batch = pack(texts).to(self.runner.device)
        with autocast(self.runner.device, dtype):
            states = self.backbone.states(self.backbone.embed(batch.tokens), batch)
        return states.detach().float(), batch

    def _relative(self, states: Tensor) -> float:
        return _rounded(float((states - self.own_states).norm() / self.own_states.norm()))

    def _gradient(self, dtype: torch.dtype) -> tuple[Figures, Tensor]:
        """Stage I's metrics, and the gradient of all weights as one vector."""
        training = self.runner.stage1(self.backbone, self.budget, dtype)
        metrics = step(training.stage, 0, self.pairs)
        gradient = torch.cat([weight.grad.flatten() for weight in training.parameters if weight.grad is not None])
        training.drop_gradients()
        return metrics, gradient

    def float32(self) -> None:
        """States, loss and gradient in float32 without the varlen kernel, which the other parts compare with."""
        model = self.backbone.model
        model.set_attn_implementation("eager")
        own_TV = own_logits(model, self.name)
        self.backbone = Backbone(model)
        self.backbone.input_scale, self.backbone.logit_scale = measure_scales(self.backbone, own_TV, self.name)
        check_reproduced(self.backbone, own_TV, self.name)
        states, _ = self._states(torch.float32, self.texts)
        self.metrics, self.gradient = self._gradient(torch.float32)
        self.runner.record("parity float32", model=self.name, states=self._relative(states), loss=self.metrics["loss"])

    def bfloat16(self) -> None:
        """States, losses and gradients with the varlen kernel, compiled, in bfloat16."""
        runner = self.runner
        runner.varlen(self.backbone)
        not_compiled = self._relative(self._states(runner.dtype, self.texts)[0])
        seconds = runner.compile(self.backbone)
        states = self._relative(self._states(runner.dtype, self.texts)[0])
        metrics, gradient = self._gradient(runner.dtype)
        differences = {
            f"{name}_nats": _rounded(value - self.metrics[name])
            for name, value in metrics.items()
            if name.startswith("loss")
        }
        figures = {"states": states, "states_not_compiled": not_compiled, **differences}
        figures["gradient_cosine"] = round(float(F.cosine_similarity(gradient, self.gradient, dim=0)), 6)
        figures["gradient_norm_ratio"] = _rounded(float(gradient.norm() / self.gradient.norm()))
        runner.record("parity", model=self.name, varlen=self.backbone.varlen, compile_s=seconds, **figures)

    @torch.no_grad()
    def company(self) -> None:
        """Vectors of texts packed alone and packed with others."""
        states, batch = self._states(self.runner.dtype, self.texts)
        together = F.normalize(states[batch.anchors], dim=-1)
        alone = []
        for text in self.texts[:8]:
            states, batch = self._states(self.runner.dtype, [text])
            alone.append(F.normalize(states[batch.anchors], dim=-1))
        alone_NH, together_NH = torch.cat(alone), together[: len(alone)]
        difference = float((alone_NH - together_NH).abs().max())
        cosine = float((alone_NH * together_NH).sum(-1).min())
        largest = float(alone_NH.abs().max())
        self.runner.record("parity company", model=self.name, most=difference, largest=largest, least_cosine=cosine)

    def head(self) -> None:
        """Gradients of the chunked loss with bfloat16 products, against float32, of the same inputs."""
        rows, device = (64 if self.runner.tiny else 8192), self.runner.device
        count, hidden = self.backbone.head.weight.shape
        states = torch.randn(rows, hidden, device=device).bfloat16().float().requires_grad_()
        weight = (0.02 * torch.randn(count, hidden, device=device)).bfloat16().float().requires_grad_()
        targets, weights = torch.randint(count, (rows,), device=device), torch.full((rows,), 1 / rows, device=device)
        expected = F.cross_entropy(states @ weight.T, targets)
        float32_gradients = torch.autograd.grad(expected, (states, weight))
        with autocast(device, self.runner.dtype):
            loss, _ = linear_cross_entropy(states, weight, targets, weights)
        gradients = torch.autograd.grad(loss, (states, weight))
        errors = [
            _rounded(float((ours - exact).norm() / exact.norm()))
            for ours, exact in zip(gradients, float32_gradients, strict=True)
        ]
        difference = _rounded(float((loss - expected).detach()))
        self.runner.record(
            "parity head", rows=rows, words=count, loss_nats=difference, into_states=errors[0], into_weight=errors[1]
        )

    def replay(self) -> None:
        """GradCache with dropout: both passes of a chunk must give the same embeddings, compiled and not."""
        add_lora(self.backbone, LORA.rank, LORA.alpha, LORA.dropout, LORA.targets)
        self.backbone.to(self.runner.device)
        for name, weight in self.backbone.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.05)
        embedder = BareEmbedder(self.backbone, self.runner.dtype).train()
        chunks = [pack(self.texts[i::4]).to(self.runner.device) for i in range(4)]
        for compiled in (True, False):
            if compiled:
                self.runner.compile(self.backbone)
            else:
                undo_compiling(self.backbone)
            self._replay(embedder, chunks, compiled)

    def _replay(self, embedder: BareEmbedder, chunks: list[PackedBatch], compiled: bool) -> None:
        """Compare embeddings of GradCache's two passes, and those of a third pass, whose dropout is another."""
        passes: list[Tensor] = []

        def embed(chunk: PackedBatch) -> Tensor:
            vectors: Tensor = embedder(chunk)
            passes.append(F.normalize(vectors.detach(), dim=-1))
            return vectors

        cache = GradCache(embed, chunks, self.runner.device)
        cache.backward(F.normalize(cache.vectors_NH, dim=-1).sum())
        embedder.zero_grad(set_to_none=True)
        with torch.no_grad():
            third = F.normalize(embedder(chunks[0]), dim=-1)
        both = [*zip(passes[: len(chunks)], passes[len(chunks) :], strict=True)]
        figures = {
            "most": max(float((first - second).abs().max()) for first, second in both),
            "least_cosine": min(float((first * second).sum(-1).min()) for first, second in both),
            "most_drawn_anew": float((third - passes[0]).abs().max()),
        }
        self.runner.record("parity replay", model=self.name, compiled=compiled, **figures)


def undo_compiling(backbone: Backbone) -> None:
    """Run the layers without their compiled code."""
    for layer in backbone.layers:
        layer._compiled_call_impl = None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# --- 3. Waits for the GPU ---------------------------------------------------------------------------------------


@contextmanager
def record_syncs(runner: Runner) -> Iterator[list[str]]:
    """Yield a list of the lines where the CPU waits for the GPU, to which each wait adds: ours, then torch's."""
    waits: list[str] = []

    def add_wait(message: Any, _: type[Warning], filename: str, lineno: int, *__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "anchorembed" in f.filename or f.filename == __file__]
        our_line = f"{_short(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
        torch_line = f"{_short(filename)}:{lineno}"
        waits.append(our_line if our_line == torch_line else f"{our_line} ({torch_line})")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = add_wait
        if runner.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if runner.cuda:
                torch.cuda.set_sync_debug_mode("default")


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def syncs(runner: Runner, training: Training, stage: str, name: str) -> None:
    """Record where the CPU waits for the GPU in a step after warm-up, and how often before metrics are read back."""
    pairs = draw_pairs(4 if runner.tiny else 128, VOCABULARY[name])
    training.stage = replace(training.stage, budget=token_count(pairs) // 3)  # several micro-batches
    for number in range(2):
        training.step(training.stage.make_batch(number, pairs))
    runner.wait()
    before_read_back: list[int] = []
    with record_syncs(runner) as waits:
        batch = training.stage.make_batch(2, pairs)
        preparing = len(waits)
        training.step(batch, lambda: before_read_back.append(len(waits)))
    places = dict(Counter(waits).most_common(20))
    counts = {"preparing": preparing, "before_read_back": before_read_back[0] - preparing, "in_all": len(waits)}
    runner.record("syncs", stage=stage, model=name, **counts, places=places)


# --- 4. Speed of the stages ------------------------------------------------------------------------------------------


def measure_stage(runner: Runner, stage: str, name: str) -> None:
    """Measure a stage at each token budget; with the first model also its waits, and variants of Stage I."""
    is_first_model = name == runner.options.models[0]
    count = runner.options.batch if is_first_model or stage == "stage2" else runner.options.batch // 2
    batches = [draw_pairs(count, VOCABULARY[name], seed) for seed in range(3)]
    backbone = runner.backbone(name)
    budgets = BUDGETS[name]
    training = getattr(runner, stage)(backbone, budgets[0])
    compiling = {"compile_s": runner.compile(backbone)}
    if is_first_model and "syncs" in runner.options.parts:
        runner.run_part("syncs", 15, lambda: syncs(runner, training, stage, name), stage=stage)
    for budget in budgets if stage in runner.options.parts else ():
        at_budget(runner, training, batches, {"stage": stage, "model": name, "budget": budget, **compiling})
        compiling = {}
    if is_first_model and stage == "stage1" and stage in runner.options.parts:
        variants(runner, training, batches, {"stage": stage, "model": name, "budget": sorted(budgets)[-2]})


def variants(runner: Runner, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    """Measure Stage I not compiled, and compiled with a bfloat16 residual stream."""
    backbone = _backbone(training.module)
    undo_compiling(backbone)
    at_budget(runner, training, batches, {**named, "variant": "not compiled"})
    backbone.residual_dtype = torch.bfloat16
    seconds = runner.compile(backbone)
    at_budget(runner, training, batches, {**named, "variant": "bfloat16 residual", "compile_s": seconds})


def at_budget(runner: Runner, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    """Measure a stage at a token budget, and free the memory it took."""
    training.stage = replace(training.stage, budget=named["budget"])
    runner.run_part("speed", 15, lambda: _at_budget(runner, training, batches, named), **named)
    training.drop_gradients()
    runner.free()


def _at_budget(runner: Runner, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    stage, backbone = training.stage, _backbone(training.module)
    began = time.perf_counter()
    stage.make_batch(0, batches[0])
    runner.wait()
    preparing = time.perf_counter() - began
    measured = runner.steps(training, lambda number: stage.make_batch(number, batches[number % len(batches)]))
    pairs = batches[0]
    flops = statistics.mean(stage.flops(0, batch) for batch in batches)
    seconds = measured.seconds
    runner.record(
        "speed",
        **named,
        pairs=len(pairs),
        pairs_s=round(len(pairs) / seconds, 1),
        tokens_s=round(token_count(pairs) / seconds),
        ms=round(1e3 * seconds, 1),
        issued_ms=round(1e3 * measured.issue_seconds, 1),
        prepare_ms=round(1e3 * preparing, 1),
        of_peak=round(flops / seconds / runner.peak_flops, 4),
        peak_gb=measured.peak_gb,
        first_step_s=round(measured.first_seconds, 2),
        varlen=backbone.varlen,
    )


def _backbone(module: nn.Module) -> Backbone:
    return next(part for part in module.modules() if isinstance(part, Backbone))


# --- 5. Sentence-transformers' trainer -------------------------------------------------------------------------------


def theirs(runner: Runner, name: str) -> None:
    """Sentence-transformers' trainer with its plain and its cached loss, and our Stage II, on the same texts."""
    batch = runner.options.batch
    pairs = draw_pairs(batch * (runner.warmup_steps + runner.measured_steps + 1), VOCABULARY[name], seed=5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runner.model(name).save_pretrained(folder)
        tokenizer = word_tokenizer(VOCABULARY[name])
        tokenizer.save_pretrained(folder)
        runner.free()
        runner.run_part("ours", 20, lambda: _ours(runner, name, tokenizer, pairs), model=name)
        for cached in (True, False):
            trained = lambda size, cached=cached: _theirs(runner, name, folder, pairs, cached, size)  # noqa: E731
            if (
                not runner.run_part("theirs", 20, lambda run=trained: run(batch), model=name, cached=cached)
                and not cached
            ):
                runner.run_part("theirs", 20, lambda run=trained: run(batch // 2), model=name, cached=cached)


def _ours(runner: Runner, name: str, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[TokenPair]) -> None:
    """Our Stage II from texts: tokenising is part of laying out the next step, as in training."""
    size = runner.options.batch
    sides = [(as_text(pair.query), as_text(pair.document)) for pair in pairs]
    backbone = runner.backbone(name)
    training = runner.stage2(backbone, BUDGETS[name][0])
    runner.compile(backbone)

    def prepare(number: int) -> Any:
        chosen = sides[number * size : (number + 1) * size]
        queries, documents = (tokenizer([pair[side] for pair in chosen])["input_ids"] for side in (0, 1))
        tokenized = [
            TokenPair(query, document, (), [], [], TextPair("", ""))
            for query, document in zip(queries, documents, strict=True)
        ]
        return training.stage.make_batch(number, tokenized)

    measured = runner.steps(training, prepare)
    rate = {"pairs_s": round(size / measured.seconds, 1), "ms": round(1e3 * measured.seconds, 1)}
    runner.record("ours", model=name, pairs=size, budget=BUDGETS[name][0], **rate, peak_gb=measured.peak_gb)


def _theirs(runner: Runner, name: str, folder: Path, pairs: Sequence[TokenPair], cached: bool, size: int) -> None:
    """Its trainer's steps: from begin to end, and from end to end, which includes fetching and collating."""
    runner.reset_peak()
    held_gb = runner.held_gb
    begins, ends, facts = _train_theirs(
        runner, folder, pairs[: size * (runner.warmup_steps + runner.measured_steps + 1)], cached, size
    )
    stepping = statistics.median(
        [end - begin for begin, end in zip(begins, ends, strict=True)][-runner.measured_steps :]
    )
    whole = statistics.median([after - before for before, after in pairwise(ends)][-runner.measured_steps :])
    runner.record(
        "theirs",
        model=name,
        cached=cached,
        pairs=size,
        pairs_s=round(size / stepping, 1),
        pairs_s_with_collating=round(size / whole, 1),
        ms=round(1e3 * stepping, 1),
        ms_with_collating=round(1e3 * whole, 1),
        peak_gb=runner.peak_gb(),
        held_before_gb=held_gb,
        **facts,
    )


def _train_theirs(
    runner: Runner, folder: Path, pairs: Sequence[TokenPair], cached: bool, size: int
) -> tuple[list[float], list[float], Figures]:
    """Train; returns the times at which each step began and ended, and the settings of the run."""
    # Imported here, as the parts before this one need neither sentence-transformers nor datasets.
    from datasets import Dataset  # noqa: PLC0415
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: PLC0415
    from sentence_transformers import __version__ as version  # noqa: PLC0415
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: PLC0415
    from theirs import lora_config, ranking_loss, trainer_settings  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from transformers.utils import is_flash_attn_2_available  # noqa: PLC0415

    attention = "flash_attention_2" if runner.cuda and is_flash_attn_2_available() else "sdpa"
    module = Transformer(str(folder), model_kwargs={"attn_implementation": attention}, max_seq_length=128)
    pooling = Pooling(module.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[module, pooling], device=str(runner.device))
    facts = {"attention": attention, "weights": str(next(model.parameters()).dtype), "version": version}
    model.add_adapter(lora_config())
    loss = ranking_loss(model, 64 if cached else None)
    begins: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Records when steps begin and end, once the GPU is done."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            runner.wait()
            begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            runner.wait()
            ends.append(time.perf_counter())

    columns = {"anchor": [as_text(p.query) for p in pairs], "positive": [as_text(p.document) for p in pairs]}
    with tempfile.TemporaryDirectory() as temporary:
        settings = trainer_settings(temporary, size, len(pairs) // size, use_cpu=not runner.cuda, seed=0)
        trainer = SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
        )
        trainer.train()
    return begins, ends, facts


# --- 6. The comparison -----------------------------------------------------------------------------------------------


def compare(runner: Runner) -> None:
    """Train and evaluate with and without Stage I, in a process that is asked to stop when time is up."""
    options = runner.options
    command = [sys.executable, "-m", "anchorembed", "compare", options.recipe, "--results", options.results]
    command += ["--data", options.data] if options.data else []
    with subprocess.Popen([*map(str, command)]) as process:  # noqa: S603 - ourselves
        try:
            process.wait(max(0.0, runner.seconds_left() - _STOP_SECONDS))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it writes a checkpoint and ends
            process.wait(_STOP_SECONDS)
    runner.record("compare", exit_code=process.returncode, results=str(options.results))


# --- 7. Summary ------------------------------------------------------------------------------------------------------


def summary(runner: Runner) -> None:
    """Record the main figures."""
    figures: Figures = {}
    for line in runner.lines:
        if line["what"] == "parity" and "states" in line:
            figures |= {name: line[name] for name in ("states", "loss_nats", "gradient_cosine")}
        if line["what"] == "speed" and "of_peak" in line and "variant" not in line:
            name = f"{line['stage']} {line['model']} of_peak"
            figures[name] = max(figures.get(name, 0.0), line["of_peak"])
        if line["what"] == "theirs" and "pairs_s" in line:
            figures |= _compared(runner, line)
    runner.record("summary", **figures)


def _compared(runner: Runner, line: Figures) -> Figures:
    """Our pairs/s over theirs, and our memory over theirs."""
    ours = [other for other in runner.lines if other["what"] == "ours" and other["model"] == line["model"]]
    if not ours or "pairs_s" not in ours[0]:
        return {}
    name = f"{line['model']} ours/{'cached' if line['cached'] else 'plain'}"
    rates = {name: line["pairs_s"], f"{name} with collating": line["pairs_s_with_collating"]}
    memory = {f"{name} memory": _rounded(ours[0]["peak_gb"] / line["peak_gb"])} if line["peak_gb"] else {}
    return {key: _rounded(ours[0]["pairs_s"] / rate) for key, rate in rates.items()} | memory


# --- On a CPU --------------------------------------------------------------------------------------------------------


def register_cpu_kernels() -> None:
    """Register CPU kernels for the two varlen operators, which torch has for CUDA alone; they are plain attention."""

    def compute(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> Tensor:
        groups, parts = q.shape[1] // k.shape[1], []
        for a, b in pairwise(ends.tolist()):
            wide = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
            sides = (side[a:b].transpose(0, 1) for side in wide)
            parts.append(F.scaled_dot_product_attention(*sides, is_causal=True, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    @varlen._varlen_attn.register_kernel("cpu")
    def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, ends = given[:4]
        scale = given[8] if len(given) > 8 else None
        mixed = compute(query.float(), key.float(), value.float(), ends, scale)
        return mixed.to(query.dtype), torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(*given: Any) -> tuple[Tensor, ...]:
        slope, query, key, value = given[:4]
        ends, scale = given[6], given[12] if len(given) > 12 else None

        def forward(*sides: Tensor) -> Tensor:
            return compute(*sides, ends, scale)

        gradients = torch.func.vjp(forward, query.float(), key.float(), value.float())[1](slope.float())
        return tuple(gradient.to(query.dtype) for gradient in gradients)


# --- The command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts that the options name."""
    options = arguments()
    runner = Runner(options)
    logging.getLogger("anchorembed").addHandler(_Warnings(runner))
    if options.tiny:
        register_cpu_kernels()
    runner.run_part("machine", 5, lambda: machine(runner))
    compiled_model = options.models[0]
    for what, name, work in _plan(runner):
        wanted = {what} | ({"syncs"} if what.startswith("stage") and name == options.models[0] else set())
        if not wanted & set(options.parts):
            continue
        if name != compiled_model:
            torch._dynamo.reset()  # compiled code serves other parts with the same model, but no other model
        compiled_model = name
        runner.run_part(what, 30, work, model=name)
    if "compare" in options.parts:
        runner.run_part("compare", 60, lambda: compare(runner))
    summary(runner)


class _Warnings(logging.Handler):
    """Records warnings of the package as lines."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(logging.WARNING)
        self.runner = runner

    def emit(self, record: logging.LogRecord) -> None:
        """Record a warning."""
        self.runner.record("warning", text=record.getMessage()[:600])


def _plan(runner: Runner) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Parts, models and the functions to run, the most important first."""
    models = runner.options.models
    yield "parity", models[0], lambda: Parity(runner).run()
    for name in models:
        for stage in ("stage1", "stage2"):
            yield stage, name, lambda stage=stage, name=name: measure_stage(runner, stage, name)
        if name == models[0]:
            yield "theirs", name, lambda name=name: theirs(runner, name)
            yield "replay", name, lambda: Parity(runner, compared=False).replay()
    for name in models[1:2]:
        yield "theirs", name, lambda name=name: theirs(runner, name)


def arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description="Both stages, and sentence-transformers' trainer, on one GPU.")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-out"), help="folder of gpu.jsonl, to which lines are appended"
    )
    parser.add_argument("--seconds", type=float, default=240, help="start no part later (default 240)")
    parser.add_argument("--batch", type=int, help="pairs a step (default 512, tiny 4)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}; or compare")
    parser.add_argument("--models", help=f"which of {', '.join(SHAPES)}")
    parser.add_argument(
        "--data", type=Path, help="of the comparison: the folder that its recipe calls $ANCHOREMBED_DATA"
    )
    parser.add_argument("--results", type=Path, help="of the comparison: its results folder (default OUT/compare)")
    parser.add_argument("--recipe", type=Path, default=_RECIPE, help="of the comparison (default compare-gpu.yaml)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    options.results = options.results or options.out / "compare"
    options.models = options.models.split(",") if options.models else ["tiny"] if options.tiny else list(SHAPES)[:3]
    options.batch = options.batch or (4 if options.tiny else 512)
    if unknown := [name for name in options.parts if name not in (*PARTS, "compare")] + [
        n for n in options.models if n not in SHAPES
    ]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    main()
