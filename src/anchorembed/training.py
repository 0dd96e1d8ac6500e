"""One loop, two stages: ``reconstruct(recipe)`` anchors the EOS state, ``contrast(recipe)`` learns to compare.

A stage is a step (``steps.py``: pairs -> gradients and metrics); ``fit`` gives it batches, and does everything else:
schedule, clipping, checkpoints, log, evaluation by callback, resuming.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from anchorembed.backbone import LoraSettings, weights_sha256
from anchorembed.checkpoint import Plan, load_checkpoint, read_plan, save_checkpoint, write_file, write_folder
from anchorembed.config import Contrast, Recipe, Reconstruct, Schedule
from anchorembed.distributed import anywhere, gathered_weights, rank, sharded, wait, whole
from anchorembed.embedder import METADATA, Embedder, read_metadata, saved_sha256
from anchorembed.errors import InputError
from anchorembed.flops import step_flops
from anchorembed.progress import progress_bar
from anchorembed.records import TextPair
from anchorembed.runtime import cache_folder, find_device, peak_memory, seed_everything, seed_step
from anchorembed.sampling import Split, batches, split
from anchorembed.steps import Contrastive, Metrics, Reconstruction, ReconstructionModule
from anchorembed.store import PairStore, SourceFile, content_key, open_store
from anchorembed.tokens import Lengths, Template, TokenPair, instruct

StageName = Literal["reconstruct", "contrast"]
BEST = "best"  # folder of the best evaluation's checkpoint while a stage runs


class Interrupted(Exception):
    """Training was asked to stop and has written a checkpoint; ``signal`` is the number of the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


# --- The loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loop:
    """What ``fit`` needs beside the step: the schedule and where things go."""

    name: str
    schedule: Schedule
    seed: int
    folder: Path
    places: Callable[[Sequence[int]], str]  # where pairs come from
    resume: str  # what to type to continue
    plan: Plan  # what decides the result
    say: Callable[[str], None]


def make_optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW over the float32 weights that train, in one pass."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the decay to zero after the last step."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return schedule.learning_rate
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    factor = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.learning_rate * factor


def fit(
    loop: Loop,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    step: Callable[[int, list[int]], Metrics],
    order: Callable[[int], Iterator[list[int]]],
    evaluate: Callable[[], Metrics],
) -> None:
    """Run the steps of a stage, from the last checkpoint if there is one.

    Args:
        loop: schedule and places.
        module: its trainable weights are trained.
        optimizer: of those weights.
        accelerator: for its trackers.
        step: accumulates gradients for the pairs of one step.
        order: the pairs of all steps from a given one on.
        evaluate: called every ``evaluate_every`` steps and after the last, on held-out pairs.

    Raises:
        InputError: if a loss or gradient is not finite, or a checkpoint cannot be written.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    schedule, checkpoints = loop.schedule, loop.folder / "checkpoints"
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first = load_checkpoint(checkpoints, module, optimizer, loop.say)
    if first:
        loop.say(f"{loop.name}: resumed after step {first} of {schedule.steps}")
    log = _open_log(loop.folder / "log.jsonl", first)
    module.train()
    shown: Metrics = {}
    skipped = sum("skipped" in entry for entry in _entries(log))
    best = max((entry.get("quality", -math.inf) for entry in _entries(log)), default=-math.inf)
    with (
        (log if rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as sink,
        _stop_signals() as stop,
        progress_bar() as bar,
    ):
        task = bar.add_task(loop.name, total=schedule.steps, completed=first, note="")
        for number, indices in zip(range(first, schedule.steps), order(first), strict=False):
            started = time.perf_counter()
            seed_step(loop.seed, number, rank())
            rate = learning_rate(number, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            metrics = step(number, indices) | {"learning_rate": rate}
            norm = float(whole(nn.utils.clip_grad_norm_(parameters, schedule.max_gradient_norm)))
            metrics["gradient_norm"] = norm
            if math.isfinite(metrics["loss"]) and math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
                _skip(loop, number, indices, metrics["loss"], norm, skipped)
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}
            optimizer.zero_grad(set_to_none=False)  # a step's gradients take the last one's place
            done = number + 1
            if schedule.evaluate_every and (done % schedule.evaluate_every == 0 or done == schedule.steps):
                metrics |= _evaluated(module, evaluate)
                # what the first process finds decides for all
                if schedule.keep_best and anywhere(rank() == 0 and metrics["quality"] > best, parameters[0].device):
                    best = metrics["quality"]
                    save_checkpoint(loop.folder / BEST, done, module, optimizer, 1, loop.plan)
            _record(sink, accelerator, loop.name, done, metrics | {"seconds": time.perf_counter() - started})
            shown |= metrics  # so that the last evaluation stays in sight
            bar.update(task, advance=1, note=_note(shown))
            # read once: a signal during the save waits for the next step
            stopping = anywhere(stop.is_set(), parameters[0].device)
            if done % schedule.save_every == 0 or stopping:
                save_checkpoint(checkpoints, done, module, optimizer, schedule.keep_checkpoints, loop.plan)
            if stopping:
                raise Interrupted(stop.number, f"Stopped after step {done}. To continue: {loop.resume}")
    if schedule.keep_best:
        chosen = load_checkpoint(loop.folder / BEST, module, optimizer, loop.say)
        loop.say(f"{loop.name}: kept step {chosen}, whose quality is {best:.4f}")


def _evaluated(module: nn.Module, evaluate: Callable[[], Metrics]) -> Metrics:
    """What evaluating finds, without dropout."""
    module.eval()
    metrics = evaluate()
    module.train()
    return metrics


class _Stop(threading.Event):
    number = signal.SIGINT


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a flag that is looked at between steps; a second SIGINT stops at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.number = signal.Signals(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(metrics: Metrics) -> str:
    shown = ("loss", "gain_q2d", "gain_d2q", "held_out_accuracy")
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)


def _skip(loop: Loop, number: int, indices: Sequence[int], loss: float, norm: float, skipped: int) -> None:
    """Say that a step is left out, or that it is one too many."""
    what = (
        f"{loop.name}: step {number + 1} has loss {loss} and gradient norm {norm}, which must be finite; its pairs: "
        f"{loop.places(indices)}."
    )
    if skipped > loop.schedule.skip_steps:
        cure = "Lower the learning rate, set model.precision=float32, or allow some such steps with skip_steps."
        raise InputError(f"{what} {cure}")
    loop.say(f"{what} Left out, {skipped} of at most {loop.schedule.skip_steps}.")


def _open_log(path: Path, first: int) -> Path:
    """Drop what the log says of steps after the checkpoint: they are run again. Every process reads what is left."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in _entries(path) if entry["step"] <= first]
        write_file(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
    wait()
    return path


def _entries(log: Path) -> list[Metrics]:
    """A log's whole lines."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _record(sink: TextIO, accelerator: Accelerator, stage: str, step: int, metrics: Metrics) -> None:
    sink.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in metrics.items()}}) + "\n")
    sink.flush()
    accelerator.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)


# --- Stages from a recipe --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run: pairs on disk, how they are split, and how they become tokens."""

    store: PairStore
    split: Split
    embedder: Embedder
    temperature: float

    def order(self, size: int, seed: int, first: int = 0) -> Iterator[list[int]]:
        """Pairs of each step from ``first`` on."""
        return batches(self.store, self.split.train, size, seed, first, self.temperature)

    def tokens(self, indices: Sequence[int]) -> list[TokenPair]:
        """Read and tokenise the pairs of a step."""
        pairs: list[TextPair] = [self.store[index] for index in indices]
        sources = [self.store.sources[self.store.source_of(index)] for index in indices]
        tasks = [instruct(source.instruction) for source in sources]
        of_documents = [task if source.symmetric else "" for task, source in zip(tasks, sources, strict=True)]
        return self.embedder.pairs.pairs(pairs, tasks, of_documents)

    def summary(self) -> dict[str, object]:
        """How many pairs there are, are trained on and held out; which lines were dropped, and why."""
        dropped = {
            source.name: counts for source, counts in zip(self.store.sources, self.store.dropped, strict=True) if counts
        }
        counts = {"pairs": len(self.store), "train": len(self.split.train), "held_out": len(self.split.held_out)}
        return {**counts, "near_held_out": len(self.store) - counts["train"] - counts["held_out"], "dropped": dropped}

    def places(self, indices: Sequence[int]) -> str:
        """Source and line of pairs, the first ten."""
        named = [f"{self.store[index].source}:{self.store[index].line}" for index in indices[:10]]
        return ", ".join(named) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def train(recipe: Recipe, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Run the recipe's stages in order; finished ones are skipped, interrupted ones resumed. Returns the last model."""
    if recipe.reconstruct is None and recipe.contrast is None:
        raise InputError("recipe: both reconstruct and contrast are null. Keep one.")
    model = Path(recipe.output)
    if recipe.reconstruct is not None:
        model = reconstruct(recipe, say, resume)
    if recipe.contrast is not None:
        model = contrast(recipe, say, resume)
    return model


def reconstruct(recipe: Recipe, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Stage I: train all weights to write each side of a pair from the other's anchor. Returns the model folder."""
    settings = recipe.reconstruct
    if settings is None:
        raise InputError("recipe: reconstruct is null. Give it settings, or run contrast.")
    return _run_stage(recipe, "reconstruct", settings, recipe.model.name, say, resume)


def contrast(recipe: Recipe, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Stage II: contrastive learning from the Stage I model if it is complete. Returns the model folder."""
    settings = recipe.contrast
    if settings is None:
        raise InputError("recipe: contrast is null. Give it settings, or run reconstruct.")
    stage_one = stage_folder(recipe, "reconstruct") / "model"
    complete = recipe.reconstruct is not None and (stage_one / METADATA).exists()
    start = settings.from_ or (str(stage_one) if complete else recipe.model.name)
    return _run_stage(recipe, "contrast", settings, start, say, resume)


def stage_folder(recipe: Recipe, stage: StageName) -> Path:
    """Folder of a stage: ``log.jsonl``, ``checkpoints/`` while it runs, ``model/`` when it is complete."""
    return recipe.output / stage


def _run_stage(
    recipe: Recipe, stage: StageName, settings: Schedule, start: str, say: Callable[[str], None], resume: str
) -> Path:
    folder = stage_folder(recipe, stage)
    target = folder / "model"
    plan = _plan(recipe, stage, settings, start)
    finished = read_metadata(target)
    if finished is not None:
        _same_plan(folder, finished.history.get("plan"), plan)
        say(f"{stage}: finished before, kept: {target}")
        return target
    _same_plan(folder, read_plan(folder / "checkpoints"), plan)
    _check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=find_device(recipe.model.device).type == "cpu",
        log_with=recipe.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # passes differ in number
    )
    say = say if accelerator.is_main_process else _say_nothing
    _supported(accelerator, settings)
    say(f"{stage}: starting from {start}")
    with accelerator.local_main_process_first():  # the others find pairs converted and models fetched
        prepared = prepare(recipe, start, say)
        start_sha256 = weights_sha256(prepared.embedder.backbone.model)
        seed_everything(recipe.seed)
        module, run = objective(prepared.embedder, settings)
    if isinstance(settings, Contrast) and settings.distill and not prepared.store.scored:
        raise InputError('contrast.distill: no pair has given scores. Add a column "scores", or leave distill out.')
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "data.json", json.dumps(prepared.summary(), indent=2))
    history: dict[str, object] = {"start": start, "start_sha256": start_sha256, "plan": plan}
    history["data"] = prepared.summary()
    accelerator.init_trackers("anchorembed", config={"stage": stage})
    optimizer = make_optimizer(module, settings)
    if accelerator.num_processes > 1:
        layers = prepared.embedder.backbone.model._no_split_modules or []
        run = _together(accelerator, run, optimizer, [*layers])
    held_out = prepared.tokens(prepared.split.held_out.tolist())
    fit(
        Loop(stage, settings, recipe.seed, folder, prepared.places, resume, plan, say),
        module,
        optimizer,
        accelerator,
        step=lambda number, indices: _counted(prepared, run, number, indices),
        order=lambda first: prepared.order(settings.batch_size, recipe.seed, first),
        evaluate=_evaluation(prepared.embedder, settings, run, held_out),
    )
    for tracker in accelerator.trackers:  # end_training would also end the group of processes, which go on
        tracker.finish()
    trained = prepared.embedder
    if sharded(module):
        weights = gathered_weights(module)
        trained = _filled(recipe, start, settings, weights) if accelerator.is_main_process else trained
    if accelerator.is_main_process:
        write_folder(target, lambda place: trained.save(place, history))
        for name in ("checkpoints", BEST):
            shutil.rmtree(folder / name, ignore_errors=True)
    wait()
    say(f"{stage}: complete: {target}")
    return target


def _together(
    accelerator: Accelerator, run: Reconstruction | Contrastive, optimizer: torch.optim.Optimizer, layers: list[str]
) -> Reconstruction | Contrastive:
    """Have accelerate wrap or shard the module that a run uses; ``layers`` names the classes of its layers."""
    if accelerator.is_fsdp2:  # it asks the module itself, and ours is not transformers' own
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers
    with warnings.catch_warnings():  # accelerate passes on broadcast_buffers by a name that torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        wrapped, _ = accelerator.prepare(run.module, optimizer)  # sharding gives the optimizer its shards in place
    if accelerator.is_fsdp2:  # without synchronising it would keep whole gradients until the last micro-batch
        return replace(run, module=wrapped)
    return replace(run, module=wrapped, unsynced=lambda: accelerator.no_sync(wrapped))


def _supported(accelerator: Accelerator, settings: Schedule) -> None:
    """Refuse ways of working together that this loop does not know."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise InputError(
            f"accelerate: {kind.value} is not supported. Use DDP or FSDP2, as recipes/accelerate has them."
        )
    if accelerator.is_fsdp2 and settings.evaluate_on:
        raise InputError("evaluate_on: not with sharded weights (FSDP2). Evaluate the finished model, or use DDP.")


def _filled(recipe: Recipe, start: str, settings: Schedule, weights: dict[str, Tensor]) -> Embedder:
    """The model that a stage starts from, on the CPU, with the weights it has trained."""
    embedder = load_embedder(recipe, start, "cpu")
    with torch.no_grad():
        for name, parameter in trained_module(embedder, settings).named_parameters():
            parameter.copy_(weights[name])
    return embedder


def _evaluation(
    embedder: Embedder, settings: Schedule, run: Reconstruction | Contrastive, held_out: Sequence[TokenPair]
) -> Callable[[], Metrics]:
    """What ``evaluate_every`` measures: held-out pairs, tasks if asked for, and a ``quality`` to choose the best by.

    Without tasks quality is the accuracy on held-out pairs in Stage II, the sum of both anchor gains in Stage I.
    """
    if settings.keep_best and not (settings.evaluate_every and (settings.evaluate_on or len(held_out) > 1)):
        raise InputError("keep_best: nothing is evaluated. Set evaluate_every and data.held_out or evaluate_on.")
    measure: Callable[[Embedder], Metrics] | None = None
    if settings.evaluate_on:
        # mteb takes seconds to import: only runs that evaluate on tasks need it
        from anchorembed.benchmarking import measure_on  # noqa: PLC0415

        measure = measure_on(settings.evaluate_on)

    def evaluate() -> Metrics:
        metrics = run.report(held_out) if len(held_out) > 1 else {}
        if measure is not None:
            scores = measure(embedder)
            return metrics | scores | {"quality": sum(scores.values()) / len(scores)}
        chosen = [metrics[name] for name in ("held_out_accuracy", "gain_q2d", "gain_d2q") if name in metrics]
        return metrics | ({"quality": sum(chosen)} if chosen else {})

    return evaluate


def _counted(prepared: Prepared, run: Reconstruction | Contrastive, number: int, indices: Sequence[int]) -> Metrics:
    """Do a step and say what it cost: the texts' own tokens, model FLOPs, peak memory so far."""
    pairs = prepared.tokens(indices)
    metrics = run.step(number, pairs)
    tokens = sum(len(pair.query_text) + len(pair.document_text) for pair in pairs)
    backbone = prepared.embedder.backbone
    cost = {"flops": step_flops(backbone, run, number, pairs), "peak_gb": peak_memory(backbone.device) / 1e9}
    return metrics | {"tokens": tokens} | cost


def _say_nothing(_: str) -> None:
    """What all processes but the first have to say."""


def _check_trackers(names: list[str]) -> None:
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise InputError(f"trackers: {name!r} is not installed. Installed: {', '.join(available) or 'none'}.")


def trained_module(embedder: Embedder, settings: Schedule) -> nn.Module:
    """Return the module whose trainable weights a stage trains, its adapters added."""
    if isinstance(settings, Reconstruct):
        return ReconstructionModule(embedder)
    embedder.backbone.freeze_own_head()
    if isinstance(settings, Contrast) and settings.lora is not None:
        lora = settings.lora
        embedder.backbone.add_lora(LoraSettings(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets)))
    return embedder


def objective(embedder: Embedder, settings: Schedule) -> tuple[nn.Module, Reconstruction | Contrastive]:
    """Return the module whose trainable weights a stage trains, and what runs its steps."""
    device, budget = embedder.backbone.device, settings.tokens_per_micro_batch
    module = trained_module(embedder, settings)
    if isinstance(settings, Reconstruct):
        end_id = embedder.pairs.end_id
        return module, Reconstruction(module, device, end_id, settings.directions, settings.d2q_weight, budget)
    if not isinstance(settings, Contrast):
        raise TypeError(f"no stage has settings of type {type(settings).__name__}")
    if max(settings.dimensions, default=0) > embedder.dimension:
        raise InputError(
            f"contrast.dimensions: {max(settings.dimensions)} is above {embedder.dimension}, the model's. Lower it."
        )
    guide = None
    if settings.guide is not None:
        guide = Embedder.load(settings.guide, device=str(device))
        guide.requires_grad_(False)
    options = (settings.mask_above, guide, settings.distill, tuple(settings.dimensions))
    return module, Contrastive(module, device, settings.scale, settings.hard_negatives, budget, *options)


def prepare(recipe: Recipe, start: str, say: Callable[[str], None]) -> Prepared:
    """Open the recipe's data and load the model ``start``."""
    data = recipe.data
    store = open_pairs(recipe, say)
    parts = split(store, data.held_out, recipe.seed)
    shared = len(store) - len(parts.train) - len(parts.held_out)
    say(
        f"data: {len(parts.train)} pairs to train on, {len(parts.held_out)} held out, of {len(store)}"
        + (f"; {shared} are left out, which share a text with those held out" if shared else "")
    )
    embedder = load_embedder(recipe, start, recipe.model.device)
    for source in store.sources:
        for limit in (data.query_tokens, data.document_tokens)[: 2 if source.symmetric else 1]:
            embedder.pairs.check_room(instruct(source.instruction), limit)
    return Prepared(store, parts, embedder, data.temperature)


def load_embedder(recipe: Recipe, start: str, device: str) -> Embedder:
    """Load the model ``start`` as the recipe wants it."""
    return Embedder.load(
        start,
        precision=recipe.model.precision,
        device=device,
        template=own_template(recipe),
        lengths=Lengths(recipe.data.query_tokens, recipe.data.document_tokens),
        instruction=recipe.data.instruction,
    )


def open_pairs(recipe: Recipe, say: Callable[[str], None]) -> PairStore:
    """Open the recipe's sources, converting what is not in the cache yet."""
    data = recipe.data
    sources = [
        SourceFile(
            source.name,
            source.path,
            data.instruction if source.instruction is None else source.instruction,
            source.symmetric,
        )
        for source in data.sources
    ]
    return open_store(sources, cache_folder() / "pairs", skip_bad=data.skip_bad, log=say)


def own_template(recipe: Recipe) -> Template | None:
    """The recipe's template, where it does not leave it to the model."""
    return Template(**recipe.model.template.model_dump()) if recipe.model.template else None


def _plan(recipe: Recipe, stage: StageName, settings: Schedule, start: str) -> Plan:
    """What decides a stage's result, flat, as JSON values; what only decides its cost is left out."""
    cost_only = {"save_every", "keep_checkpoints", "tokens_per_micro_batch"}
    if not settings.keep_best:
        cost_only |= {"evaluate_every", "evaluate_on"}
    parts = {
        "data": recipe.data.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json", exclude={"device"}),
        stage: settings.model_dump(mode="json", by_alias=True, exclude=cost_only),
    }
    contents = {f"data.content.{source.name}": content_key(source.path) for source in recipe.data.sources}
    if isinstance(settings, Contrast) and settings.guide is not None:
        contents["guide_sha256"] = saved_sha256(Path(settings.guide))
    return _flatten(parts) | contents | {"seed": recipe.seed, "start": start, "start_sha256": saved_sha256(Path(start))}


def _flatten(values: object, prefix: str = "") -> Plan:
    if isinstance(values, dict) and values:
        items = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: values}


def _same_plan(folder: Path, before: object, now: Plan) -> None:
    """Refuse to continue what was started with other settings, and say which."""
    if not isinstance(before, dict):
        return
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        faults = [f"{folder}: {key} was {before.get(key)!r}, is {now.get(key)!r} now." for key in changed]
        raise InputError("\n".join([*faults, "Restore the recipe, choose another output, or delete that folder."]))
