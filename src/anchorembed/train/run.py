"""Two stages from a recipe: ``reconstruct`` anchors the EOS state, ``contrast`` learns to compare.

A stage is a step (``steps.py``: pairs -> gradients and metrics) in the one loop (``loop.py``), begun from a model and
ended with one; what was started with other settings is not continued.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from anchorembed.config import Contrast, Recipe, Reconstruct, Schedule, read_recipe
from anchorembed.errors import InputError, extra
from anchorembed.model.adapters import LoraSettings
from anchorembed.model.backbone import weights_sha256
from anchorembed.model.embedder import Embedder, read_metadata, saved_sha256
from anchorembed.model.fast import compile_layers
from anchorembed.model.load import load_config, load_tokenizer
from anchorembed.model.tokens import TokenPair
from anchorembed.system.device import Precision, compute_dtype, find_device, first_process, memory_of, seed_everything
from anchorembed.system.files import alone_in, content_key, write_file, write_folder
from anchorembed.system.processes import gathered_weights, lowest, sharded, wait
from anchorembed.train.checkpoint import Plan, read_plan
from anchorembed.train.contrast import Contrastive
from anchorembed.train.cross_entropy import CHUNK_LOGITS
from anchorembed.train.flops import step_flops
from anchorembed.train.loop import BEST, Loop, fit, learning_rate, make_optimizer, read_log
from anchorembed.train.memory import ON_CPU, Use, check_memory, fitting_budget, less_memory, shape_of, use_of
from anchorembed.train.prepare import Prepared, load_embedder, prepare
from anchorembed.train.reconstruct import Reconstruction, ReconstructionModule
from anchorembed.train.stage import Metrics

StageName = Literal["reconstruct", "contrast"]

_PATIENCE = timedelta(hours=3)  # that processes wait for one at work alone, which is 10 minutes on GPUs otherwise
_ALIKE = 0.95  # mean cosine of two anchors above which they have collapsed
_READ = 0.02  # nats a token: an anchor gain below it is noise
_MOST = 0.8  # of the pairs, at least, are expected to be used in an epoch


def train(recipe: Recipe | str | Path, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Run the stages of a recipe, or of its file, in order: finished ones are skipped, interrupted ones resumed.

    Returns the folder of the last model.
    """
    recipe = _read(recipe)
    if recipe.reconstruct is None and recipe.contrast is None:
        raise InputError("recipe: both reconstruct and contrast are null. Keep one.")
    for settings in (recipe.reconstruct, recipe.contrast):
        check_weights(recipe, settings)
    model = Path(recipe.output)
    if recipe.reconstruct is not None:
        model = reconstruct(recipe, say, resume)
    if recipe.contrast is not None:
        model = contrast(recipe, say, resume)
    return model


def reconstruct(recipe: Recipe | str | Path, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Stage I: train all weights to write each side of a pair from the other's anchor. Returns the model folder."""
    recipe = _read(recipe)
    settings = recipe.reconstruct
    if settings is None:
        raise InputError("recipe: reconstruct is null. Give it settings, or run contrast.")
    return _run_stage(recipe, "reconstruct", settings, recipe.model.name, say, resume)


def contrast(recipe: Recipe | str | Path, say: Callable[[str], None] = print, resume: str = "run it again") -> Path:
    """Stage II: contrastive learning from the Stage I model, if that was run. Returns the model folder.

    Raises:
        InputError: if Stage I was begun and is not complete, or was run with other settings than the recipe's.
    """
    recipe = _read(recipe)
    settings = recipe.contrast
    if settings is None:
        raise InputError("recipe: contrast is null. Give it settings, or run reconstruct.")
    return _run_stage(recipe, "contrast", settings, settings.from_ or _after_stage_one(recipe), say, resume)


def _read(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


def _after_stage_one(recipe: Recipe) -> str:
    """The model that Stage II starts from: Stage I's, or the base model where the recipe has none or it was not run."""
    folder = stage_folder(recipe, "reconstruct")
    if recipe.reconstruct is None or not folder.exists():
        return recipe.model.name
    finished = read_metadata(folder / "model")
    if finished is None:
        raise InputError(
            f"{folder}: Stage I was begun and is not complete. Run train, or reconstruct, to finish it; or delete that "
            "folder."
        )
    plan = _plan(recipe, "reconstruct", recipe.reconstruct, recipe.model.name)
    _same_plan(folder, finished.history.get("plan"), plan)
    return str(folder / "model")


def stage_folder(recipe: Recipe, stage: StageName) -> Path:
    """Folder of a stage: ``log.jsonl``, ``checkpoints/`` while it runs, ``model/`` when it is complete."""
    return recipe.output / stage


def _run_stage(
    recipe: Recipe, stage: StageName, settings: Schedule, start: str, say: Callable[[str], None], resume: str
) -> Path:
    folder = stage_folder(recipe, stage)
    with alone_in(folder) if first_process() else nullcontext():
        return _run_alone(recipe, stage, settings, start, folder, say, resume)


def _run_alone(
    recipe: Recipe,
    stage: StageName,
    settings: Schedule,
    start: str,
    folder: Path,
    say: Callable[[str], None],
    resume: str,
) -> Path:
    check_weights(recipe, settings)
    target = folder / "model"
    plan = _plan(recipe, stage, settings, start)
    finished = read_metadata(target)
    if finished is not None:
        _same_plan(folder, finished.history.get("plan"), plan)
        say(f"{stage}: finished before, kept: {target}")
        _clear(folder)
        return target
    _same_plan(folder, read_plan(folder / "checkpoints"), plan)
    accelerator = _accelerator(recipe, settings, folder)
    say = say if accelerator.is_main_process else _say_nothing
    say(f"{stage}: starting from {start}")
    with accelerator.local_main_process_first():  # the others find pairs converted and models fetched
        use = plan_memory(recipe, stage, settings, start, say, _shards(accelerator))
        settings = settings.model_copy(update={"tokens_per_micro_batch": use.budget})
        prepared = prepare(recipe, start, say)
        for later in (settings, recipe.contrast):  # also Stage II's faults, before Stage I has taken hours
            _check(later, prepared)
        start_sha256 = weights_sha256(prepared.embedder.backbone.model)
        seed_everything(recipe.seed)
        module, run = objective(prepared.embedder, settings)
    use = replace(use, budget=lowest(use.budget, accelerator.device))  # all processes cut steps alike
    run = replace(run, budget=use.budget)
    _say_what_is_lost(prepared, stage, settings, recipe.seed, say)
    if accelerator.is_main_process:
        write_file(folder / "data.json", json.dumps(prepared.summary(), indent=2))
    history: dict[str, object] = {"start": start, "start_sha256": start_sha256, "plan": plan}
    history |= {"data": prepared.summary(), "weights": _stored_as(recipe)}
    accelerator.init_trackers("anchorembed", config={"stage": stage})
    optimizer = make_optimizer(module, settings)
    module.train()  # layers in training and in evaluation are different graphs
    if accelerator.device.type == "cuda" and not accelerator.is_fsdp2:  # whose hooks no graph can hold
        compile_layers(prepared.embedder.backbone, prepared.embedder.dtype)
    if accelerator.num_processes > 1:
        layers = prepared.embedder.backbone.model._no_split_modules or []
        run = _together(accelerator, run, optimizer, [*layers])
    held_out = prepared.tokens(prepared.split.held_out.tolist(), run.hard_negatives)
    fit(
        Loop(stage, settings, recipe.seed, folder, prepared.places, resume, plan, say, less_memory(stage, use)),
        module,
        optimizer,
        accelerator,
        prepare=lambda number, indices: _counted(prepared, run, number, indices),
        run=run.run,
        order=lambda first: prepared.order(settings.batch_size, recipe.seed, first),
        evaluate=_evaluation(prepared.embedder, settings, run, held_out),
    )
    if stage == "reconstruct":
        _say_collapse(read_log(folder / "log.jsonl"), say)
    for tracker in accelerator.trackers:  # end_training would also end the group of processes, which go on
        tracker.finish()
    weights = gathered_weights(module) if sharded(module) else None
    if accelerator.is_main_process:
        trained = prepared.embedder if weights is None else _filled(recipe, start, settings, weights)
        write_folder(target, lambda place: trained.save(place, history))
        _clear(folder)
    wait()
    say(f"{stage}: complete: {target}")
    return target


def check_weights(recipe: Recipe, settings: Schedule | None) -> None:
    """Refuse to train all weights where they are not stored in float32: updates smaller than bfloat16's step are lost.

    Raises:
        InputError: naming what to change.
    """
    stored = recipe.model.weights
    if stored == "float32" or settings is None or (isinstance(settings, Contrast) and settings.lora is not None):
        return
    what = f"model.weights: {stored} is for adapters, and "
    if isinstance(settings, Contrast):
        raise InputError(
            f"{what}contrast.lora is null: all weights train, which need float32. Leave lora=null out, or set "
            "model.weights=float32."
        )
    raise InputError(
        f"{what}Stage I trains all weights, which need float32. Run reconstruct with model.weights=float32, then "
        f"contrast with {stored}; or leave Stage I out: reconstruct=null."
    )


def plan_memory(
    recipe: Recipe,
    stage: StageName,
    settings: Schedule,
    start: str,
    say: Callable[[str], None],
    shards: tuple[int, bool] = (1, False),
) -> Use:
    """Say what memory a stage takes, before its model is loaded, and return what it does with it.

    ``shards`` is the number of processes and whether weights are spread over them.

    Raises:
        InputError: if it cannot fit, with the figures and what to change; on the CPU only for what is exactly known.
    """
    device = find_device(recipe.model.device)
    dtype = compute_dtype(recipe.model.precision, device, recipe.model.weights)
    on_gpu, logits = device.type == "cuda", CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"])
    use = use_of(recipe, settings, dtype, logits, *shards, compiled=on_gpu)
    where = str(device) if on_gpu else "this machine"
    shape = shape_of(load_config(start))
    if settings.tokens_per_micro_batch == "auto" and on_gpu:
        use = replace(use, budget=fitting_budget(shape, use, memory_of(device)))
    say(check_memory(stage, shape, use, memory_of(device), where, strict=on_gpu))
    return use


def _shards(accelerator: Accelerator) -> tuple[int, bool]:
    return accelerator.num_processes, bool(accelerator.is_fsdp2)


def _stored_as(recipe: Recipe) -> str:
    """How a stage's frozen weights are stored, and what is saved, for the model's history."""
    stored = recipe.model.weights
    if stored == "float32":
        return stored
    return f"adapters trained on {stored} weights and merged into those, saved in bfloat16"


def _check(settings: Schedule | None, prepared: Prepared) -> None:
    """Refuse settings of a stage that cannot work with these pairs and this model.

    Raises:
        InputError: naming the first of them.
    """
    if settings is None:
        return
    if settings.keep_best and not (
        settings.evaluate_every and (settings.evaluate_on or len(prepared.split.held_out) > 1)
    ):
        raise InputError("keep_best: nothing is evaluated. Set evaluate_every and data.held_out or evaluate_on.")
    if settings.evaluate_on:
        with extra("eval"):
            from anchorembed.evaluate.find import find_tasks  # noqa: PLC0415 - an extra

        find_tasks(settings.evaluate_on)
    if not isinstance(settings, Contrast):
        return
    if settings.distill and not prepared.store.scored:
        raise InputError('contrast.distill: no pair has given scores. Add a column "scores", or leave distill out.')
    dimension = prepared.embedder.dimension
    if max(settings.dimensions, default=0) > dimension:
        raise InputError(
            f"contrast.dimensions: {max(settings.dimensions)} is above {dimension}, the model's. Lower it."
        )
    if settings.lora is not None:
        prepared.embedder.backbone.adaptable(settings.lora.targets)
    if settings.guide is not None:
        load_tokenizer(settings.guide)  # a model that is not there has none


def _say_what_is_lost(
    prepared: Prepared, stage: StageName, settings: Schedule, seed: int, say: Callable[[str], None]
) -> None:
    """Say where a recipe uses less of its schedule, model or pairs than it seems to."""
    if settings.warmup_steps >= settings.steps:
        last, warmup = learning_rate(settings.steps - 1, settings), settings.warmup_steps
        say(f"{stage}: warm-up takes {warmup} steps of {settings.steps}; the learning rate ends at {last:.3g}")
    backbone = prepared.embedder.backbone
    if backbone.peft and (left_out := backbone.not_adapted()):
        say(f"{stage}: LoRA does not adapt {', '.join(left_out)}; contrast.lora.targets says what it adapts")
    have = prepared.store.most_negatives
    if isinstance(settings, Contrast) and have > settings.hard_negatives:
        say(f"{stage}: of up to {have} hard negatives a pair, {settings.hard_negatives} used: contrast.hard_negatives")
    used, size = prepared.share_used(settings.batch_size, seed), settings.batch_size
    if used < _MOST:
        say(f"data: an epoch uses {used:.0%} of the pairs in steps of {size}; the rest repeat texts or fill no step")


def _say_collapse(log: Sequence[Metrics], say: Callable[[str], None]) -> None:
    """Say so where Stage I ends with anchors that are all alike and that the decoder does not read."""
    last = next((entry for entry in reversed(log) if "cosine_q2d" in entry), None)
    if last is None:
        return
    cosine = max(last["cosine_q2d"], last["cosine_d2q"])
    gain = max(last["gain_q2d"], last["gain_d2q"])
    if cosine > _ALIKE and gain < _READ:
        say(
            f"reconstruct: anchors are nearly alike (mean cosine {cosine:.2f}) and the decoder reads nothing from them "
            f"(anchor gain {gain:.3f} nats a token). Stage II is likely better from the base model: reconstruct=null."
        )


def _clear(folder: Path) -> None:
    """Delete what a finished stage does not need, and what one that was killed as it wrote its model has left."""
    if first_process():
        for place in (folder / "checkpoints", folder / BEST, *folder.glob(".model.*")):
            shutil.rmtree(place, ignore_errors=True)


def _accelerator(recipe: Recipe, settings: Schedule, folder: Path) -> Accelerator:
    """What makes this process one of several, and keeps the run's trackers."""
    _check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=find_device(recipe.model.device).type == "cpu",
        log_with=recipe.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # passes differ in number
            InitProcessGroupKwargs(timeout=_PATIENCE),  # of all while the first converts, downloads or writes
        ],
    )
    _supported(accelerator, settings)
    if accelerator.is_fsdp2 and recipe.model.weights != "float32":
        raise InputError(
            f"model.weights: {recipe.model.weights} cannot be sharded beside float32 adapters (FSDP2). Set it to "
            "float32, or use DDP."
        )
    return accelerator


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
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"accelerate: mixed precision is {accelerator.mixed_precision}, which rounds gradients and states, too. "
            "Say no there; model.precision rounds products alone."
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

    Without tasks quality is the accuracy on held-out pairs in Stage II, in Stage I the sum of both directions' anchor
    gains of what is trained, the decoder, the bag or both.
    """
    measure: Callable[[Embedder], Metrics] | None = None
    if settings.evaluate_on:
        with extra("eval"):
            from anchorembed.evaluate.find import measure_on  # noqa: PLC0415 - an extra

        measure = measure_on(settings.evaluate_on)

    def evaluate() -> Metrics:
        metrics = run.report(held_out) if len(held_out) > 1 else {}
        if measure is not None:
            scores = measure(embedder)
            return metrics | scores | {"quality": sum(scores.values()) / len(scores)}
        chosen = [metrics[name] for name in _judged_by(settings) if name in metrics]
        return metrics | ({"quality": sum(chosen)} if chosen else {})

    return evaluate


def _judged_by(settings: Schedule) -> list[str]:
    if not isinstance(settings, Reconstruct):
        return ["held_out_accuracy"]
    trained = {"gain": settings.decode, "gain_bag": settings.bag_weight > 0}
    return [f"{gain}_{direction}" for gain, is_trained in trained.items() if is_trained for direction in ("q2d", "d2q")]


def _counted(
    prepared: Prepared, run: Reconstruction | Contrastive, number: int, indices: Sequence[int]
) -> tuple[Any, Metrics]:
    """Lay out a step and say what it costs: the texts' own tokens and model FLOPs."""
    pairs = prepared.tokens(indices, run.hard_negatives)
    tokens = sum(len(pair.query_text) + len(pair.document_text) for pair in pairs)
    backbone = prepared.embedder.backbone
    cost = {"tokens": float(tokens), "flops": step_flops(backbone, run, number, pairs)}
    return run.prepare(number, pairs), cost


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
    device = embedder.backbone.device
    budget = ON_CPU if settings.tokens_per_micro_batch == "auto" else settings.tokens_per_micro_batch
    module = trained_module(embedder, settings)
    if settings.recompute:
        embedder.backbone.recompute_layers()
    if isinstance(settings, Reconstruct):
        end_id = embedder.pairs.end_id
        how = (settings.d2q_weight, budget, settings.sink, settings.bag_weight, settings.decode)
        forms = (settings.anchor, settings.target_tokens)
        return module, Reconstruction(module, device, end_id, settings.directions, *how, *forms)
    if not isinstance(settings, Contrast):
        raise TypeError(f"no stage has settings of type {type(settings).__name__}")
    guide = None
    if settings.guide is not None:
        precision: Precision = "float32" if embedder.dtype == torch.float32 else "bfloat16"
        guide = Embedder.load(settings.guide, precision=precision, device=str(device))
        guide.requires_grad_(False)
    options = (settings.mask_above, guide, settings.distill, tuple(settings.dimensions))
    return module, Contrastive(module, device, settings.scale, settings.hard_negatives, budget, *options)


def _plan(recipe: Recipe, stage: StageName, settings: Schedule, start: str) -> Plan:
    """What decides a stage's result, flat, as JSON values; what only decides its cost is left out.

    Data and local models stand there by what they hold, so that a run goes on where folders were moved.
    """
    parts = {
        "data": recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}}),
        "model": recipe.model.model_dump(mode="json", exclude={"device", "name"} | _unsaid(recipe, stage)),
        stage: settings.model_dump(mode="json", by_alias=True, exclude=settings.cost_only | {"from_", "guide"}),
    }
    contents = {f"data.sources.{source.name}.content": content_key(source.path) for source in recipe.data.sources}
    if isinstance(settings, Contrast) and settings.guide is not None:
        contents["guide"] = _content(settings.guide)
    return _flatten(parts) | contents | {"seed": recipe.seed, "start": _content(start)}


def _unsaid(recipe: Recipe, stage: StageName) -> set[str]:
    """Keys of the model that do not concern a stage: Stage I has float32 weights whatever Stage II has."""
    weights = {"weights"} if stage == "reconstruct" or recipe.model.weights == "float32" else set()
    return weights | ({"residual"} if recipe.model.residual == "float32" else set())


def _content(model: str) -> str:
    """SHA-256 of the weights of a model we saved, or of the files of another local one; the name of one on the hub."""
    place = Path(model).expanduser()
    return saved_sha256(place) or (content_key(place) if place.exists() else model)


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
