"""Train the stages of a recipe: ``reconstruct`` (Stage I) and ``contrast`` (Stage II).

One loop (`loop`) runs every stage (`stage`), from a model folder or hub model to a model folder. A stage that was
started with other settings is not continued.
"""

import gc
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from anchorembed.data.sampling import source_epoch
from anchorembed.errors import InputError, extra
from anchorembed.export.card import write_card
from anchorembed.model.backbone import weights_sha256
from anchorembed.model.compile_layers import compile_layers
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import absolute_name
from anchorembed.model.metadata import read_metadata
from anchorembed.recipe_file import read_recipe
from anchorembed.recipe_schema import Recipe, Schedule
from anchorembed.system.device import compute_dtype, find_device, memory_of, seed_everything
from anchorembed.system.files import check_outside, lock_folder, to_json, whole_folder, write_file
from anchorembed.system.processes import first_process, gathered_weights, in_any_process, lowest, sharded, wait_for_all
from anchorembed.train.check_memory import check_memory, less_memory
from anchorembed.train.checkpoint import Plan, read_plan
from anchorembed.train.contrast import Contrastive
from anchorembed.train.cross_entropy import CHUNK_LOGITS
from anchorembed.train.distributed import embedder_with, open_accelerator, wrap_for_processes
from anchorembed.train.kept_recipe import keep_recipe
from anchorembed.train.loop import BEST, Interrupted, Loop, fit, read_log, stop_signals
from anchorembed.train.memory_estimate import Use, fitting_budget, shape_of_model, use_of
from anchorembed.train.optimizer import learning_rate, make_optimizer
from anchorembed.train.prepare import Prepared, prepare
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.resume_plan import check_same_plan, plan_of
from anchorembed.train.stage import Metrics, Stage, StageName, batch_and_costs, evaluation
from anchorembed.train.verdict import conclude

STAGES: dict[StageName, type[Stage]] = {"reconstruct": Reconstruction, "contrast": Contrastive}

_log = logging.getLogger(__name__)
_EXPECTED_USE = 0.8  # share of the pairs that an epoch uses, at least, unless texts repeat


def train(recipe: Recipe | str | Path) -> Path:
    """Run the stages of a recipe, or of its file, in order: finished ones are skipped, interrupted ones resumed.

    Then log whether training helped (`verdict`). Returns the folder of the last model.
    """
    recipe = _read(recipe)
    if recipe.reconstruct is None and recipe.contrast is None:
        raise InputError("recipe: both reconstruct and contrast are null. Keep one.")
    if recipe.reconstruct is not None and recipe.contrast is not None and recipe.contrast.from_ is not None:
        raise InputError(
            f"contrast.from: Stage II would start from {recipe.contrast.from_} and leave Stage I unused. Set "
            "reconstruct=null, or leave contrast.from out."
        )
    for name, stage in STAGES.items():  # checks Stage II before Stage I takes hours
        if (settings := recipe.stage(name)) is not None:
            stage.check_stored(settings, recipe.model.weights)
    model = Path(recipe.output)
    if recipe.reconstruct is not None:
        model = reconstruct(recipe)
    if recipe.contrast is not None:
        model = contrast(recipe)
    if first_process():
        conclude(recipe, model)
    wait_for_all()
    return model


def reconstruct(recipe: Recipe | str | Path) -> Path:
    """Stage I: train all weights, or adapters, to write each side of a pair from the other's anchor.

    Returns the model folder.
    """
    recipe = _read(recipe)
    if recipe.reconstruct is None:
        raise InputError("recipe: reconstruct is null. Give it settings, or run contrast.")
    return run_stage(recipe, Reconstruction, recipe.reconstruct, recipe.model.name)


def contrast(recipe: Recipe | str | Path) -> Path:
    """Stage II: contrastive learning from the Stage I model, if that was run. Returns the model folder.

    Raises:
        InputError: if Stage I was begun and is not complete, or was run with other settings than the recipe's.
    """
    recipe = _read(recipe)
    settings = recipe.contrast
    if settings is None:
        raise InputError("recipe: contrast is null. Give it settings, or run reconstruct.")
    return run_stage(recipe, Contrastive, settings, settings.from_ or _after_stage_one(recipe))


def _read(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


def _after_stage_one(recipe: Recipe) -> str:
    """The model that Stage II starts from: Stage I's, or the base model where the recipe has none or it was not run."""
    folder = recipe.output / "reconstruct"
    if recipe.reconstruct is None or not folder.exists():
        return recipe.model.name
    finished = read_metadata(folder / "model")
    if finished is None:
        raise InputError(f"{folder}: Stage I is not complete. Run train, or reconstruct, to finish it; or delete that.")
    plan = plan_of(recipe, "reconstruct", recipe.reconstruct, recipe.model.name)
    check_same_plan(folder, finished.history.get("plan"), plan, _extended_by("reconstruct", folder))
    return str(folder / "model")


def _extended_by(name: str, folder: Path) -> str:
    """The settings with which another run starts from a stage's model."""
    model = folder / "model"
    return f"set model.name={model}" if name == "reconstruct" else f"set contrast.from={model} and reconstruct=null"


def run_stage(recipe: Recipe, stage_class: type[Stage], settings: Schedule, start: str) -> Path:
    """Train a stage of a recipe from the model ``start``, or resume it; returns the model's folder.

    The recipe is kept in the output folder. The stage's folder there has ``log.jsonl``, ``checkpoints/`` while it runs,
    and ``model/`` when it is complete; only one process of this machine works in it at a time.

    Raises:
        InputError: if it cannot be trained with these settings, or was begun with others.
    """
    check_outside(recipe.output, (source.path for source in recipe.data.sources))
    folder = recipe.output / stage_class.name
    with lock_folder(folder) if first_process() else nullcontext():
        stage_class.check_stored(settings, recipe.model.weights)
        plan = plan_of(recipe, stage_class.name, settings, start)
        finished = read_metadata(folder / "model")
        if finished is None:
            check_same_plan(folder, read_plan(folder / "checkpoints"), plan)
            model = _train_stage(recipe, stage_class, settings, start, folder, plan)
            gc.collect()  # compiled layers refer to themselves: weights and gradients would stay in memory
            return model
        check_same_plan(folder, finished.history.get("plan"), plan, _extended_by(stage_class.name, folder))
        _log.info("%s: finished before, kept: %s", stage_class.name, folder / "model")
        _clear(folder)
        return folder / "model"


def _train_stage(
    recipe: Recipe, stage_class: type[Stage], settings: Schedule, start: str, folder: Path, plan: Plan
) -> Path:
    name, target = stage_class.name, folder / "model"
    accelerator, device = open_accelerator(recipe, settings, folder), find_device(recipe.model.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the log has the peak of this stage
    _log.info("%s: starting from %s", name, start)
    with accelerator.local_main_process_first():  # it fetches the configuration
        use = plan_memory(recipe, stage_class, settings, start, (accelerator.num_processes, bool(accelerator.is_fsdp2)))
    use = replace(use, budget=lowest(use.budget, device))  # all processes cut steps alike
    with accelerator.local_main_process_first():  # it converts pairs and fetches models
        prepared = prepare(recipe, start)
        settings = prepared.in_steps(settings, recipe.seed)
        _check_stages(recipe, stage_class, settings, prepared)
        start_sha256 = weights_sha256(prepared.embedder.backbone.model)
        seed_everything(recipe.seed)
        stage = stage_class.build(prepared.embedder, settings, use.budget)
    _log_unused(stage, prepared, recipe.seed)
    origin = {"start": absolute_name(start), "start_sha256": start_sha256, "plan": plan}
    history = origin | _data_and_weights(recipe, prepared)
    if accelerator.is_main_process:
        keep_recipe(recipe)
        write_file(folder / "data.json", to_json(history["data"], indent=2))
    accelerator.init_trackers("anchorembed", config={"stage": name})
    module, optimizer = stage.module, make_optimizer(stage.module, settings)
    module.train()  # layers in training and in evaluation are different graphs
    if device.type == "cuda" and not accelerator.is_fsdp2:  # a graph cannot hold FSDP2's hooks
        compile_layers(prepared.embedder.backbone, prepared.embedder.dtype)
    if accelerator.num_processes > 1:
        stage = wrap_for_processes(accelerator, stage, optimizer)
    with stop_signals() as stop:  # until the model is written
        fit(
            Loop(name, settings, recipe.seed, folder, prepared.lines_of, plan, less_memory(name, use), stop),
            module,
            optimizer,
            accelerator,
            make_batch=partial(batch_and_costs, stage, prepared),
            run=stage.run,
            order=partial(prepared.order, settings.batch_size, recipe.seed),
            evaluate=evaluation(stage, prepared),
        )
        if accelerator.is_main_process:
            _warn_of_failure(stage, read_log(folder / "log.jsonl"))
        for tracker in accelerator.trackers:  # end_training would also end the process group, which is still needed
            tracker.finish()
        weights = gathered_weights(module) if sharded(module) else None
        if accelerator.is_main_process:
            whole = None if weights is None else embedder_with(recipe, stage_class, settings, start, weights)
            _write_model(whole or prepared.embedder, target, history)
            _clear(folder)
    wait_for_all()
    _log.info("%s: complete: %s", name, target)
    if in_any_process(stop.is_set(), device):
        raise Interrupted(stop.number, "Stopped.")
    return target


def _data_and_weights(recipe: Recipe, prepared: Prepared) -> dict[str, object]:
    """What a trained model's history says of its pairs, its weights and the stages before."""
    stored = recipe.model.weights
    merged = f"adapters trained on {stored} weights and merged into those, saved in bfloat16"
    return {
        "data": prepared.summary(),
        "weights": stored if stored == "float32" else merged,
        "before": prepared.embedder.metadata.stages,
    }


def _write_model(trained: Embedder, target: Path, history: dict[str, object]) -> None:
    """Write a trained model with its history and card."""
    with whole_folder(target) as unfinished:
        trained.save(unfinished, history)
        write_card(unfinished, "/".join(target.parts[-3:]), trained.dimension)


def plan_memory(
    recipe: Recipe, stage_class: type[Stage], settings: Schedule, start: str, shards: tuple[int, bool] = (1, False)
) -> Use:
    """Log what memory a stage takes, before its model is loaded, and return the settings that decide it.

    ``shards`` is the number of processes and whether weights are spread over them.

    Raises:
        InputError: if it cannot fit, with the figures and what to change; on the CPU only for what is not estimated.
    """
    device = find_device(recipe.model.device)
    dtype = compute_dtype(recipe.model.precision, device, recipe.model.weights)
    on_gpu, logits = device.type == "cuda", CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"])
    use = use_of(
        recipe, settings, stage_class.step_size(settings, recipe.data), dtype, logits, *shards, compiled=on_gpu
    )
    device_name = str(device) if on_gpu else "this machine"
    shape = shape_of_model(start)
    guides = [shape_of_model(model).count for model in settings.other_models.values()]
    use = replace(use, guide=torch.float32.itemsize * sum(guides))
    if settings.tokens_per_micro_batch == "auto" and on_gpu:
        use = replace(use, budget=fitting_budget(shape, use, memory_of(device)))
    _log.info(check_memory(stage_class.name, shape, use, memory_of(device), device_name, strict=on_gpu))
    return use


def _check_stages(recipe: Recipe, stage_class: type[Stage], settings: Schedule, prepared: Prepared) -> None:
    """Refuse settings of this stage, or of a Stage II to come, that cannot work with these pairs and this model."""
    stages: list[tuple[type[Stage], Schedule]] = [(stage_class, settings)]
    if recipe.contrast is not None and stage_class is not Contrastive:
        stages.append((Contrastive, recipe.contrast))
    for checked, its_settings in stages:
        check_settings(checked, its_settings, prepared)
        hard = getattr(its_settings, "hard_negatives", 0)  # Stage I has none
        counts = (hard,) if checked is stage_class else (0, hard)  # 0 first, which is faster and mostly suffices
        _check_sources(checked, its_settings, prepared, recipe.seed, counts)


def _check_sources(
    stage_class: type[Stage], settings: Schedule, prepared: Prepared, seed: int, counts: Sequence[int]
) -> None:
    """Refuse a source if no step of its first epoch has a gradient, with any of ``counts`` hard negatives a pair."""
    for number, source in enumerate(prepared.store.sources):
        tried: list[int] = []
        for step in source_epoch(prepared.store, prepared.split.train, settings.batch_size, seed, 0, number):
            if any(stage_class.teaches(settings, prepared.tokens(step, count)) for count in counts):
                break
            tried += step
        else:
            if tried:
                raise InputError(
                    f"{stage_class.name}: no step of source {source.name} has two usable pairs, as their texts are the "
                    f"same or become no tokens: {prepared.lines_of(tried)}. Correct its texts, or remove the source."
                )


def check_settings(stage_class: type[Stage], settings: Schedule, prepared: Prepared) -> None:
    """Refuse settings of a stage that cannot work with this model, or evaluations that cannot be made.

    Raises:
        InputError: naming the first such setting.
    """
    stage_class.check(settings, prepared)
    if (settings.keep_best or settings.patience) and not (
        settings.evaluate_every and (settings.evaluate_on or len(prepared.split.held_out) > 1)
    ):
        key = "keep_best" if settings.keep_best else "patience"
        raise InputError(f"{key}: nothing is evaluated. Set evaluate_every and data.held_out or evaluate_on.")
    if settings.evaluate_on:
        with extra("eval"):
            from anchorembed.evaluate.find import find_tasks  # noqa: PLC0415 - an extra

        find_tasks(settings.evaluate_on)


def _log_unused(stage: Stage, prepared: Prepared, seed: int) -> None:
    """Log which parts of its schedule, model or pairs a recipe leaves unused."""
    settings = stage.settings
    if settings.epochs:
        _log.info("%s: %g epochs are %s steps", stage.name, settings.epochs, settings.steps)
    if settings.warmup_steps >= settings.steps:
        last, warmup = learning_rate(settings.steps - 1, settings), settings.warmup_steps
        _log.info(
            "%s: warm-up takes %s steps of %s; the learning rate ends at %.3g", stage.name, warmup, settings.steps, last
        )
    for sentence in stage.unused(prepared):
        _log.info("%s: %s", stage.name, sentence)
    used, size = prepared.share_used(settings.batch_size, seed), settings.batch_size
    if size > (have := len(prepared.split.train)):
        _log.info("%s: batch_size is %s, and a step has at most the %s pairs there are", stage.name, size, have)
    if used < _EXPECTED_USE:
        _log.info(
            "data: an epoch uses %.0f%% of the pairs in steps of %s; the rest repeat texts or fill no step",
            100 * used,
            size,
        )


def _warn_of_failure(stage: Stage, log: Sequence[Metrics]) -> None:
    """Warn if the log of a finished stage shows that training failed, in part or in whole."""
    if empty := sum("teaches_nothing" in entry for entry in log):
        _log.warning(
            "%s: %s of %s steps taught nothing: they have no two usable pairs, as texts repeat or become no tokens",
            stage.name,
            empty,
            len(log),
        )
    if verdict := stage.verdict(log):
        _log.warning("%s: %s", stage.name, verdict)


def _clear(folder: Path) -> None:
    """Delete what a finished stage does not need, and unfinished models of killed processes."""
    if first_process():
        for path in (folder / "checkpoints", folder / BEST, *folder.glob(".model.*")):
            shutil.rmtree(path, ignore_errors=True)
