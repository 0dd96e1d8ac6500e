"""What one GPU does with both stages, and with sentence-transformers' trainer: a JSON line a result, as it is found.

    python3 speed/gpu.py --out DIR --seconds 240      # on a GPU; needs no network and no files
    python3 speed/gpu.py --parts compare --data DATA --results DIR --seconds 430   # part two, on real pairs
    python3 speed/gpu.py --tiny --out DIR             # every part of the first at toy size on a CPU: that it works

Weights and tokens are random, in the shapes of real models and the lengths of short search texts: templated queries of
about 24 tokens, at most 32, documents of about 100, at most 128. Each part may fail alone: what it raised is a line.
No part begins with too little time left. Lines go to DIR/gpu.jsonl, too. Part two is `anchorembed compare` with
recipes/compare-gpu.yaml, asked to stop in time; finished cells stay in the results folder and are not run again.
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
from anchorembed.model.embedder import Embedder
from anchorembed.model.fast import compile_layers, use_varlen
from anchorembed.model.packing import PackedBatch, pack
from anchorembed.model.reproduce import check_reproduced, measure_scales, own_logits
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Contrast, Lora, Reconstruct
from anchorembed.system.device import autocast
from anchorembed.train.contrast import Contrastive
from anchorembed.train.contrastive_losses import SCALE
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.gradcache import GradCache
from anchorembed.train.loop import one_ahead
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.stage import Stage, read_back, step

Figures = dict[str, Any]
PARTS = ("machine", "parity", "syncs", "stage1", "stage2", "theirs", "replay")
_RECIPE = Path(__file__).parents[1] / "recipes" / "compare-gpu.yaml"
_TO_STOP = 40  # seconds that a comparison is given to write its checkpoint
CONTRAST = Contrast(hard_negatives=0)
LORA = Lora()
WORDS = 4096  # tokens that texts are drawn from, at most
END, FIRST = 2, 3  # the end token's id, and the first that stands in texts
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
WORDS_OF = {"smollm2-135m": 49152, "qwen3-0.6b": 151936, "llama-1b": 128256, "tiny": 512}
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
        return [rng.randrange(FIRST, min(words, WORDS)) for _ in range(length)]

    drawn = ((text(13, 5, 32), text(92, 25, 128)) for _ in range(count))
    return [_templated(query, document) for query, document in drawn]


def _templated(query: list[int], document: list[int]) -> TokenPair:
    return TokenPair([*HEADER, *query, END], [*HEADER, *document, END], (), query, document, TextPair("", ""))


def tokens_of(pairs: Sequence[TokenPair]) -> int:
    """Tokens of both templated sides."""
    return sum(len(pair.query) + len(pair.document) for pair in pairs)


def as_text(ids: Sequence[int]) -> str:
    """A text that ``word_tokenizer`` turns into these ids."""
    return " ".join(f"w{number}" for number in ids)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words ``w0``, ``w1`` and so on: ``w0`` pads."""
    backend = Tokenizer(WordLevel({f"w{number}": number for number in range(min(words, WORDS))}, unk_token="w1"))  # noqa: S106 - no password
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "w0", "unk_token": "w1", "eos_token": f"w{END}"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


# --- The engine around random weights --------------------------------------------------------------------------------


class Bare(nn.Module):
    """What the stages need of an embedder, without tokenizer and files."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone, self.dtype = backbone, dtype
        self.pairs = SimpleNamespace(end_id=END)

    forward = Embedder.forward


class Training:
    """A stage with its optimizer: ``step`` is what the training loop does with a batch that is laid out."""

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
        """Give the gradients' memory back."""
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of the measured steps: medians in seconds, of whole steps and of issuing them, and what they took beside time."""

    seconds: float
    issued: float
    first: float
    peak_gb: float


class Lab:
    """Where parts run and say what they find."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.started, self.told, self.tiny = time.monotonic(), told, told.tiny
        self.device = torch.device("cpu" if told.tiny else "cuda")
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        self.warm, self.times = (1, 2) if self.tiny else (2, 5)  # steps before those that are measured, and those
        self.flops_s = 1.0  # the measured peak
        self.held_gb = 0.0
        self.lines: list[Figures] = []
        told.out.mkdir(parents=True, exist_ok=True)
        self.file = (told.out / "gpu.jsonl").open("a", encoding="utf-8")

    def left(self) -> float:
        """Seconds."""
        return self.told.seconds - (time.monotonic() - self.started)

    def say(self, what: str, **figures: Any) -> None:
        """Print and keep a line."""
        self.lines.append({"what": what, "at": round(time.monotonic() - self.started, 1), **figures})
        line = json.dumps(self.lines[-1])
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def guarded(self, what: str, need: float, work: Callable[[], None], **named: Any) -> bool:
        """Run a part that may fail alone, if ``need`` seconds are left; returns whether it went well."""
        if self.left() < need and not self.tiny:
            self.say(what, **named, skipped=f"{self.left():.0f} s left, {need:.0f} s needed")
            return False
        try:
            work()
        except Exception as error:  # the reason is the finding
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error)[:600]}"
            self.say(what, **named, failed=reason, place=f"{place.filename}:{place.lineno}")
            failed = True
        else:
            failed = False
        self.free()
        return not failed

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Count the most memory held from here on; ``held_gb`` is what is held already."""
        if self.cuda:
            self.held_gb = round(torch.cuda.memory_allocated() / 1e9, 2)
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """The most memory held since then."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else 0.0

    def model(self, name: str) -> PreTrainedModel:
        """Random weights in float32, on the device."""
        torch.manual_seed(0)
        with self.device:
            return SHAPES[name]().float().to(self.device)

    def backbone(self, name: str) -> Backbone:
        """The same as a backbone, with the varlen kernel."""
        backbone = Backbone(self.model(name))
        self.varlen(backbone)
        return backbone

    def varlen(self, backbone: Backbone) -> None:
        """Attention by the varlen kernel, on a CPU by its stand-in."""
        if self.cuda:
            use_varlen(backbone, self.dtype)
        else:
            backbone.varlen = True

    def compile(self, backbone: Backbone) -> float:
        """Compile the layers; returns the seconds that took."""
        began = time.perf_counter()
        if not compile_layers(backbone, self.dtype, backend="inductor" if self.cuda else "aot_eager"):
            self.say("compiling", failed="compile_layers returned False: see its warning")
        self.wait()
        return round(time.perf_counter() - began, 1)

    def stage1(self, backbone: Backbone, budget: int, dtype: torch.dtype | None = None) -> Training:
        """Stage I, both directions, all weights."""
        bare = Bare(backbone, dtype or self.dtype)
        return Training(Reconstruction.build(bare, Reconstruct(sink=False), budget))  # type: ignore[arg-type]

    def stage2(self, backbone: Backbone, budget: int) -> Training:
        """Stage II with LoRA."""
        stage = Contrastive.build(Bare(backbone, self.dtype), CONTRAST, budget)  # type: ignore[arg-type]
        backbone.to(self.device)
        return Training(stage)

    def timed(self, work: Callable[[], object]) -> float:
        """Median seconds of something small."""
        found = []
        for _ in range(self.warm + self.times):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found[self.warm :])

    def steps(self, training: Training, prepare: Callable[[int], Any]) -> Measured:
        """Steps as the loop does them, the next one laid out in a thread; they are waited for at their ends only."""
        seconds, issued = [], []
        self.reset_peak()
        order = ((number, [number]) for number in range(self.warm + self.times))
        began = time.perf_counter()
        for _, _, laid_out in one_ahead(lambda number, _: (prepare(number), {}), order):
            batch, _ = laid_out.result()
            training.step(batch, lambda began=began: issued.append(time.perf_counter() - began))
            self.wait()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        return Measured(
            statistics.median(seconds[self.warm :]), statistics.median(issued[self.warm :]), seconds[0], self.peak_gb()
        )


# --- 1. The machine --------------------------------------------------------------------------------------------------


def machine(lab: Lab) -> None:
    """Peak of a product and of a copy."""
    size = 256 if lab.tiny else 8192
    a, b = (torch.randn(size, size, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
    lab.flops_s = 2 * size**3 / lab.timed(lambda: a @ b)
    source = torch.randn(size * size * 4, device=lab.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / lab.timed(lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if lab.cuda else "cpu"
    speed = {"tflops": round(lab.flops_s / 1e12, 2), "copy_gb_s": round(copied / 1e9, 1)}
    lab.say("machine", name=name, torch=torch.__version__, **speed, cpus=os.cpu_count())


# --- 2. Parity -------------------------------------------------------------------------------------------------------


class Parity:
    """Packed, compiled and bfloat16 against padded float32, on one model."""

    def __init__(self, lab: Lab, compared: bool = True) -> None:
        self.lab, self.name = lab, lab.told.models[0]
        torch.backends.cuda.matmul.allow_tf32 = False
        model = lab.model(self.name).eval()
        self.pairs = draw_pairs(4 if lab.tiny else 64, model.config.vocab_size, seed=1)
        self.texts = [pair.document for pair in self.pairs]
        self.own = self._own(model) if compared else torch.empty(0)
        self.backbone = Backbone(model)
        self.budget = 10**9 if lab.cuda else 10**4

    def run(self) -> None:
        """All of it; the first must come first."""
        lab = self.lab
        for need, what in (
            (20.0, self.float32),
            (40.0, self.bfloat16),
            (10.0, self.company),
            (10.0, self.head),
        ):
            lab.guarded(f"parity {what.__name__}", need, what, model=self.name)

    @torch.no_grad()
    def _own(self, model: PreTrainedModel) -> Tensor:
        """Final states by the model's own forward on padded texts, the texts' own end to end."""
        model.set_attn_implementation("sdpa")
        longest = max(map(len, self.texts))
        ids = torch.tensor([text + [END] * (longest - len(text)) for text in self.texts], device=self.lab.device)
        lengths = torch.tensor([len(text) for text in self.texts], device=self.lab.device)
        mask = torch.arange(longest, device=self.lab.device) < lengths[:, None]
        states = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states[mask].float()

    def _states(self, dtype: torch.dtype, texts: Sequence[list[int]]) -> tuple[Tensor, PackedBatch]:
        batch = pack(texts).to(self.lab.device)
        with autocast(self.lab.device, dtype):
            states = self.backbone.states(self.backbone.embed(batch.tokens), batch)
        return states.detach().float(), batch

    def _relative(self, states: Tensor) -> float:
        return _rounded(float((states - self.own).norm() / self.own.norm()))

    def _gradient(self, dtype: torch.dtype) -> tuple[Figures, Tensor]:
        """Stage I's metrics, and the gradient of all weights as one vector."""
        training = self.lab.stage1(self.backbone, self.budget, dtype)
        metrics = step(training.stage, 0, self.pairs)
        gradient = torch.cat([weight.grad.flatten() for weight in training.parameters if weight.grad is not None])
        training.drop_gradients()
        return metrics, gradient

    def float32(self) -> None:
        """The engine in float32 by buckets, which the rest is compared with."""
        model = self.backbone.model
        model.set_attn_implementation("eager")
        own_TV = own_logits(model, self.name)
        self.backbone = Backbone(model)
        self.backbone.input_scale, self.backbone.logit_scale = measure_scales(self.backbone, own_TV, self.name)
        check_reproduced(self.backbone, own_TV, self.name)
        states, _ = self._states(torch.float32, self.texts)
        self.metrics, self.gradient = self._gradient(torch.float32)
        self.lab.say("parity float32", model=self.name, states=self._relative(states), loss=self.metrics["loss"])

    def bfloat16(self) -> None:
        """States, losses and gradients of the fast path."""
        lab = self.lab
        lab.varlen(self.backbone)
        not_compiled = self._relative(self._states(lab.dtype, self.texts)[0])
        seconds = lab.compile(self.backbone)
        states = self._relative(self._states(lab.dtype, self.texts)[0])
        metrics, gradient = self._gradient(lab.dtype)
        differences = {
            f"{name}_nats": _rounded(value - self.metrics[name])
            for name, value in metrics.items()
            if name.startswith("loss")
        }
        found = {"states": states, "states_not_compiled": not_compiled, **differences}
        found["gradient_cosine"] = round(float(F.cosine_similarity(gradient, self.gradient, dim=0)), 6)
        found["gradient_norm_ratio"] = _rounded(float(gradient.norm() / self.gradient.norm()))
        lab.say("parity", model=self.name, varlen=self.backbone.varlen, compile_s=seconds, **found)

    @torch.no_grad()
    def company(self) -> None:
        """A text's vector alone and in company."""
        states, batch = self._states(self.lab.dtype, self.texts)
        together = F.normalize(states[batch.anchors], dim=-1)
        alone = []
        for text in self.texts[:8]:
            lone, batch = self._states(self.lab.dtype, [text])
            alone.append(F.normalize(lone[batch.anchors], dim=-1))
        one, other = torch.cat(alone), together[: len(alone)]
        difference, cosine = float((one - other).abs().max()), float((one * other).sum(-1).min())
        largest = float(one.abs().max())
        self.lab.say("parity company", model=self.name, most=difference, largest=largest, least_cosine=cosine)

    def head(self) -> None:
        """The chunked loss's gradients by bfloat16 products against float32 throughout, of the same rounded inputs."""
        rows, device = (64 if self.lab.tiny else 8192), self.lab.device
        count, hidden = self.backbone.head.weight.shape
        states = torch.randn(rows, hidden, device=device).bfloat16().float().requires_grad_()
        weight = (0.02 * torch.randn(count, hidden, device=device)).bfloat16().float().requires_grad_()
        targets, weights = torch.randint(count, (rows,), device=device), torch.full((rows,), 1 / rows, device=device)
        expected = F.cross_entropy(states @ weight.T, targets)
        plain = torch.autograd.grad(expected, (states, weight))
        with autocast(device, self.lab.dtype):
            loss, _ = linear_cross_entropy(states, weight, targets, weights)
        ours = torch.autograd.grad(loss, (states, weight))
        found = [_rounded(float((x - y).norm() / y.norm())) for x, y in zip(ours, plain, strict=True)]
        difference = _rounded(float((loss - expected).detach()))
        self.lab.say(
            "parity head", rows=rows, words=count, loss_nats=difference, into_states=found[0], into_weight=found[1]
        )

    def replay(self) -> None:
        """GradCache with dropout: both passes of a chunk embed alike, compiled and not."""
        add_lora(self.backbone, LORA.rank, LORA.alpha, LORA.dropout, LORA.targets)
        self.backbone.to(self.lab.device)
        for name, weight in self.backbone.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.05)
        embedder = Bare(self.backbone, self.lab.dtype).train()
        chunks = [pack(self.texts[i::4]).to(self.lab.device) for i in range(4)]
        for compiled in (True, False):
            if compiled:
                self.lab.compile(self.backbone)
            else:
                without_compiling(self.backbone)
            self._replay(embedder, chunks, compiled)

    def _replay(self, embedder: Bare, chunks: list[PackedBatch], compiled: bool) -> None:
        """Embeddings of GradCache's two passes, and of a third that draws anew."""
        seen: list[Tensor] = []

        def embed(chunk: PackedBatch) -> Tensor:
            vectors: Tensor = embedder(chunk)
            seen.append(F.normalize(vectors.detach(), dim=-1))
            return vectors

        cache = GradCache(embed, chunks, self.lab.device)
        cache.backward(F.normalize(cache.vectors_NH, dim=-1).sum())
        embedder.zero_grad(set_to_none=True)
        with torch.no_grad():
            anew = F.normalize(embedder(chunks[0]), dim=-1)
        count = len(chunks)
        most = max(float((a - b).abs().max()) for a, b in zip(seen[:count], seen[count:], strict=True))
        cosine = min(float((a * b).sum(-1).min()) for a, b in zip(seen[:count], seen[count:], strict=True))
        other = float((anew - seen[0]).abs().max())
        figures = {"most": most, "least_cosine": cosine, "most_drawn_anew": other}
        self.lab.say("parity replay", model=self.name, compiled=compiled, **figures)


def without_compiling(backbone: Backbone) -> None:
    """Let the layers run as they are."""
    for layer in backbone.layers:
        layer._compiled_call_impl = None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# --- 3. What waits for the GPU ---------------------------------------------------------------------------------------


@contextmanager
def counted_syncs(lab: Lab) -> Iterator[list[str]]:
    """Places, as they are reached, where the CPU waits for the GPU: ours, and torch's if that is another."""
    found: list[str] = []

    def note(message: Any, _: type[Warning], filename: str, lineno: int, *__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        ours = [f for f in traceback.extract_stack()[:-1] if "anchorembed" in f.filename or f.filename == __file__]
        place = f"{_short(ours[-1].filename)}:{ours[-1].lineno}" if ours else "?"
        inner = f"{_short(filename)}:{lineno}"
        found.append(place if place == inner else f"{place} ({inner})")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if lab.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if lab.cuda:
                torch.cuda.set_sync_debug_mode("default")


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def syncs(lab: Lab, training: Training, stage: str, name: str) -> None:
    """One warm step of a stage: how often the CPU waits, where, and how often before the metrics are read back."""
    pairs = draw_pairs(4 if lab.tiny else 128, WORDS_OF[name])
    training.stage = replace(training.stage, budget=tokens_of(pairs) // 3)  # several micro-batches
    for number in range(2):
        training.step(training.stage.make_batch(number, pairs))
    lab.wait()
    before: list[int] = []
    with counted_syncs(lab) as found:
        batch = training.stage.make_batch(2, pairs)
        preparing = len(found)
        training.step(batch, lambda: before.append(len(found)))
    places = dict(Counter(found).most_common(20))
    counts = {"preparing": preparing, "before_read_back": before[0] - preparing, "in_all": len(found)}
    lab.say("syncs", stage=stage, model=name, **counts, places=places)


# --- 4. Speed of the stages ------------------------------------------------------------------------------------------


def speed(lab: Lab, stage: str, name: str) -> None:
    """A stage at each token budget; of the first model also where it waits, and variants of Stage I."""
    first = name == lab.told.models[0]
    count = lab.told.batch if first or stage == "stage2" else lab.told.batch // 2
    batches = [draw_pairs(count, WORDS_OF[name], seed) for seed in range(3)]
    backbone = lab.backbone(name)
    budgets = BUDGETS[name]
    training = getattr(lab, stage)(backbone, budgets[0])
    compiling = {"compile_s": lab.compile(backbone)}
    if first and "syncs" in lab.told.parts:
        lab.guarded("syncs", 15, lambda: syncs(lab, training, stage, name), stage=stage)
    for budget in budgets if stage in lab.told.parts else ():
        at_budget(lab, training, batches, {"stage": stage, "model": name, "budget": budget, **compiling})
        compiling = {}
    if first and stage == "stage1" and stage in lab.told.parts:
        variants(lab, training, batches, {"stage": stage, "model": name, "budget": sorted(budgets)[-2]})


def variants(lab: Lab, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    """Not compiled, and compiled with a bfloat16 residual stream."""
    backbone = _backbone(training.module)
    without_compiling(backbone)
    at_budget(lab, training, batches, {**named, "variant": "not compiled"})
    backbone.residual_dtype = torch.bfloat16
    seconds = lab.compile(backbone)
    at_budget(lab, training, batches, {**named, "variant": "bfloat16 residual", "compile_s": seconds})


def at_budget(lab: Lab, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    """One line of speed."""
    training.stage = replace(training.stage, budget=named["budget"])
    lab.guarded("speed", 15, lambda: _at_budget(lab, training, batches, named), **named)
    training.drop_gradients()
    lab.free()


def _at_budget(lab: Lab, training: Training, batches: Sequence[list[TokenPair]], named: Figures) -> None:
    stage, backbone = training.stage, _backbone(training.module)
    began = time.perf_counter()
    stage.make_batch(0, batches[0])
    lab.wait()
    preparing = time.perf_counter() - began
    measured = lab.steps(training, lambda number: stage.make_batch(number, batches[number % len(batches)]))
    pairs = batches[0]
    flops = statistics.mean(stage.flops(0, batch) for batch in batches)
    seconds = measured.seconds
    lab.say(
        "speed",
        **named,
        pairs=len(pairs),
        pairs_s=round(len(pairs) / seconds, 1),
        tokens_s=round(tokens_of(pairs) / seconds),
        ms=round(1e3 * seconds, 1),
        issued_ms=round(1e3 * measured.issued, 1),
        prepare_ms=round(1e3 * preparing, 1),
        of_peak=round(flops / seconds / lab.flops_s, 4),
        peak_gb=measured.peak_gb,
        first_step_s=round(measured.first, 2),
        varlen=backbone.varlen,
    )


def _backbone(module: nn.Module) -> Backbone:
    return next(part for part in module.modules() if isinstance(part, Backbone))


# --- 5. Sentence-transformers' trainer -------------------------------------------------------------------------------


def theirs(lab: Lab, name: str) -> None:
    """Its trainer with its plain and its cached loss, and our Stage II, on the same texts."""
    batch = lab.told.batch
    pairs = draw_pairs(batch * (lab.warm + lab.times + 1), WORDS_OF[name], seed=5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lab.model(name).save_pretrained(folder)
        tokenizer = word_tokenizer(WORDS_OF[name])
        tokenizer.save_pretrained(folder)
        lab.free()
        lab.guarded("ours", 20, lambda: _ours(lab, name, tokenizer, pairs), model=name)
        for cached in (True, False):
            trained = lambda size, cached=cached: _theirs(lab, name, folder, pairs, cached, size)  # noqa: E731
            if not lab.guarded("theirs", 20, lambda run=trained: run(batch), model=name, cached=cached) and not cached:
                lab.guarded("theirs", 20, lambda run=trained: run(batch // 2), model=name, cached=cached)


def _ours(lab: Lab, name: str, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[TokenPair]) -> None:
    """Stage II from texts: tokenising is part of laying out the next step, as it is in training."""
    size = lab.told.batch
    sides = [(as_text(pair.query), as_text(pair.document)) for pair in pairs]
    backbone = lab.backbone(name)
    training = lab.stage2(backbone, BUDGETS[name][0])
    lab.compile(backbone)

    def prepare(number: int) -> Any:
        chosen = sides[number * size : (number + 1) * size]
        queries, documents = (tokenizer([pair[side] for pair in chosen])["input_ids"] for side in (0, 1))
        tokenized = [
            TokenPair(query, document, (), [], [], TextPair("", ""))
            for query, document in zip(queries, documents, strict=True)
        ]
        return training.stage.make_batch(number, tokenized)

    measured = lab.steps(training, prepare)
    rate = {"pairs_s": round(size / measured.seconds, 1), "ms": round(1e3 * measured.seconds, 1)}
    lab.say("ours", model=name, pairs=size, budget=BUDGETS[name][0], **rate, peak_gb=measured.peak_gb)


def _theirs(lab: Lab, name: str, folder: Path, pairs: Sequence[TokenPair], cached: bool, size: int) -> None:
    """Steps of its trainer: from beginning to end, and from end to end, which has fetching and collating in it."""
    lab.reset_peak()
    held_gb = lab.held_gb
    begins, ends, facts = _train_theirs(lab, folder, pairs[: size * (lab.warm + lab.times + 1)], cached, size)
    stepping = statistics.median([end - begin for begin, end in zip(begins, ends, strict=True)][-lab.times :])
    whole = statistics.median([after - before for before, after in pairwise(ends)][-lab.times :])
    lab.say(
        "theirs",
        model=name,
        cached=cached,
        pairs=size,
        pairs_s=round(size / stepping, 1),
        pairs_s_with_collating=round(size / whole, 1),
        ms=round(1e3 * stepping, 1),
        ms_with_collating=round(1e3 * whole, 1),
        peak_gb=lab.peak_gb(),
        held_before_gb=held_gb,
        **facts,
    )


def _train_theirs(
    lab: Lab, folder: Path, pairs: Sequence[TokenPair], cached: bool, size: int
) -> tuple[list[float], list[float], Figures]:
    """Train; returns when each step began and ended, and what it ran with."""
    # Imported here so that the parts before this one need neither it nor datasets.
    from datasets import Dataset  # noqa: PLC0415
    from peft import LoraConfig, TaskType  # noqa: PLC0415
    from sentence_transformers import (  # noqa: PLC0415
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers import __version__ as version  # noqa: PLC0415
    from sentence_transformers.sentence_transformer.losses import (  # noqa: PLC0415
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from transformers.utils import is_flash_attn_2_available  # noqa: PLC0415

    attention = "flash_attention_2" if lab.cuda and is_flash_attn_2_available() else "sdpa"
    module = Transformer(str(folder), model_kwargs={"attn_implementation": attention}, max_seq_length=128)
    pooling = Pooling(module.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[module, pooling], device=str(lab.device))
    facts = {"attention": attention, "weights": str(next(model.parameters()).dtype), "version": version}
    lora = {"r": LORA.rank, "lora_alpha": LORA.alpha, "lora_dropout": LORA.dropout, "target_modules": [*LORA.targets]}
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **lora))
    named = {"mini_batch_size": 64} if cached else {}
    loss = (CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss)(model, scale=SCALE, **named)
    begins: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        """When steps begin and end, on the GPU as well."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            lab.wait()
            begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            lab.wait()
            ends.append(time.perf_counter())

    columns = {"anchor": [as_text(p.query) for p in pairs], "positive": [as_text(p.document) for p in pairs]}
    with tempfile.TemporaryDirectory() as temporary:
        settings = SentenceTransformerTrainingArguments(
            output_dir=temporary,
            max_steps=len(pairs) // size,
            per_device_train_batch_size=size,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=not lab.cuda,
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
        )
        trainer.train()
    return begins, ends, facts


# --- 6. The comparison -----------------------------------------------------------------------------------------------


def compare(lab: Lab) -> None:
    """Part two: train and evaluate with and without Stage I, in a process that is asked to stop when time is up."""
    told = lab.told
    command = [sys.executable, "-m", "anchorembed", "compare", told.recipe, "--results", told.results]
    command += ["--data", told.data] if told.data else []
    with subprocess.Popen([*map(str, command)]) as process:  # noqa: S603 - ourselves
        try:
            process.wait(max(0.0, lab.left() - _TO_STOP))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it writes a checkpoint and ends
            process.wait(_TO_STOP)
    lab.say("compare", exit_code=process.returncode, results=str(told.results))


# --- 7. Summary ------------------------------------------------------------------------------------------------------


def summary(lab: Lab) -> None:
    """The figures that the rest is about."""
    found: Figures = {}
    for line in lab.lines:
        if line["what"] == "parity" and "states" in line:
            found |= {name: line[name] for name in ("states", "loss_nats", "gradient_cosine")}
        if line["what"] == "speed" and "of_peak" in line and "variant" not in line:
            name = f"{line['stage']} {line['model']} of_peak"
            found[name] = max(found.get(name, 0.0), line["of_peak"])
        if line["what"] == "theirs" and "pairs_s" in line:
            found |= _compared(lab, line)
    lab.say("summary", **found)


def _compared(lab: Lab, line: Figures) -> Figures:
    """Our pairs/s over theirs, and our memory over theirs."""
    ours = [other for other in lab.lines if other["what"] == "ours" and other["model"] == line["model"]]
    if not ours or "pairs_s" not in ours[0]:
        return {}
    name = f"{line['model']} ours/{'cached' if line['cached'] else 'plain'}"
    rates = {name: line["pairs_s"], f"{name} with collating": line["pairs_s_with_collating"]}
    memory = {f"{name} memory": _rounded(ours[0]["peak_gb"] / line["peak_gb"])} if line["peak_gb"] else {}
    return {key: _rounded(ours[0]["pairs_s"] / rate) for key, rate in rates.items()} | memory


# --- On a CPU --------------------------------------------------------------------------------------------------------


def stand_ins() -> None:
    """CPU kernels for the two varlen operators, which are CUDA's alone, by autograd over the plain computation."""

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

        into = torch.func.vjp(forward, query.float(), key.float(), value.float())[1](slope.float())
        return tuple(one.to(query.dtype) for one in into)


# --- The command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts that were asked for."""
    told = arguments()
    lab = Lab(told)
    logging.getLogger("anchorembed").addHandler(_Warnings(lab))
    if told.tiny:
        stand_ins()
    lab.guarded("machine", 5, lambda: machine(lab))
    before = told.models[0]
    for what, name, work in _plan(lab):
        wanted = {what} | ({"syncs"} if what.startswith("stage") and name == told.models[0] else set())
        if not wanted & set(told.parts):
            continue
        if name != before:
            torch._dynamo.reset()  # what is compiled of one model serves its other parts, and none of the others'
        before = name
        lab.guarded(what, 30, work, model=name)
    if "compare" in told.parts:
        lab.guarded("compare", 60, lambda: compare(lab))
    summary(lab)


class _Warnings(logging.Handler):
    """What the package warns of is a line, too."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(logging.WARNING)
        self.lab = lab

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        self.lab.say("warning", text=record.getMessage()[:600])


def _plan(lab: Lab) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Parts, models and the work; what is worth most comes first."""
    models = lab.told.models
    yield "parity", models[0], lambda: Parity(lab).run()
    for name in models:
        for stage in ("stage1", "stage2"):
            yield stage, name, lambda stage=stage, name=name: speed(lab, stage, name)
        if name == models[0]:
            yield "theirs", name, lambda name=name: theirs(lab, name)
            yield "replay", name, lambda: Parity(lab, compared=False).replay()
    for name in models[1:2]:
        yield "theirs", name, lambda name=name: theirs(lab, name)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Both stages, and sentence-transformers' trainer, on one GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder of gpu.jsonl, which is added to")
    parser.add_argument("--seconds", type=float, default=240, help="no part begins later (default 240)")
    parser.add_argument("--batch", type=int, help="pairs a step (default 512, tiny 4)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}; or compare")
    parser.add_argument("--models", help=f"which of {', '.join(SHAPES)}")
    parser.add_argument("--data", type=Path, help="of the comparison: what its recipe calls $ANCHOREMBED_DATA")
    parser.add_argument("--results", type=Path, help="of the comparison: its results folder (default OUT/compare)")
    parser.add_argument("--recipe", type=Path, default=_RECIPE, help="of the comparison (default compare-gpu.yaml)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    told = parser.parse_args()
    told.parts = told.parts.split(",")
    told.results = told.results or told.out / "compare"
    told.models = told.models.split(",") if told.models else ["tiny"] if told.tiny else list(SHAPES)[:3]
    told.batch = told.batch or (4 if told.tiny else 512)
    if unknown := [name for name in told.parts if name not in (*PARTS, "compare")] + [
        n for n in told.models if n not in SHAPES
    ]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return told


if __name__ == "__main__":
    main()
