"""Run a comparison: arms x seeds x collections, each finished cell kept at once and never run twice.

Every training is an ordinary recipe, written beside its run and trained by the command line in a process of its own,
so it can be resumed, repeated by hand, and costs only its own memory. What is finished is in a results folder
(`results.py`).
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import yaml

from anchorembed.compare.arms import (
    Arm,
    Values,
    choices,
    contrast_recipe,
    find_arms,
    first_recipe,
    matched_steps,
    seeds_of,
)
from anchorembed.compare.controls import ArmRecipe, train_arm
from anchorembed.compare.results import COMMON, OWN, Results, Run
from anchorembed.config import Compare, Recipe, Schedule
from anchorembed.errors import LESS_MEMORY, InputError
from anchorembed.evaluate.find import find_tasks
from anchorembed.evaluate.isotropy import isotropy
from anchorembed.evaluate.tasks import Task, TaskEmbedder, TaskScore, check_instructions, run_tasks
from anchorembed.model.embedder import METADATA, Embedder
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.device import find_device, versions
from anchorembed.system.files import alone_in, content_key, write_file
from anchorembed.train.loop import Interrupted, read_log
from anchorembed.train.prepare import Prepared, load_embedder, prepare

_ISOTROPY_PAIRS = 512
_GLANCE = 0.5  # seconds between looks for a signal


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a recipe compares: its arms, with the steps that match the primary one's compute."""

    recipe: Recipe
    settings: Compare
    arms: list[Arm]
    matched: dict[str, int]
    results: Results
    tasks: dict[str, list[Task]]  # by the report's tables

    def runs(self) -> Iterator[Run]:
        """All runs: every arm's first seed before any second; common settings, after own ones, with the first only."""
        most = max(len(seeds_of(self.settings, arm)) for arm in self.arms)
        for place in range(most):
            for arm in self.arms:
                for seed in seeds_of(self.settings, arm)[place : place + 1]:
                    for setting in (OWN, COMMON) if not place and self._has_common(arm) else (OWN,):
                        yield Run(arm, seed, setting)

    def missing(self) -> list[Run]:
        """Runs without results for every collection."""
        return [run for run in self.runs() if self.tasks_left(run)]

    def tasks_left(self, run: Run) -> list[Task]:
        """Collections that a run has no results for."""
        done = self.results.cells(run)
        tasks = {task.name: task for tasks in self.tasks.values() for task in tasks}
        return [task for name, task in tasks.items() if name not in done]

    def _has_common(self, arm: Arm) -> bool:
        return arm.trained and arm.name != self.settings.primary and len(choices(self.recipe)) > 1


def open_comparison(recipe: Recipe, folder: Path) -> Comparison:
    """Read what is there of a comparison; counts FLOPs to match compute, trains nothing."""
    if recipe.compare is None:
        raise InputError("recipe: it has no compare section. Add one, as recipes/compare.yaml has it.")
    if recipe.model.weights != "float32":
        raise InputError(
            f"model.weights: {recipe.model.weights} is for LoRA alone, and a comparison trains all weights, too. Set "
            "it to float32."
        )
    if recipe.contrast is not None and recipe.contrast.from_ is not None:
        raise InputError(
            "contrast.from: has no effect in a comparison, where arms say what Stage II starts from. Leave it out."
        )
    if len(choices(recipe)) > 1 and recipe.contrast is not None:
        for key, value in (
            ("contrast.evaluate_every", recipe.contrast.evaluate_every),
            ("data.held_out", recipe.data.held_out),
        ):
            if not value:
                raise InputError(f"{key}: 0 with a compare.grid, which chooses by held-out pairs. Set it above 0.")
    arms = find_arms(recipe.compare)
    quick = recipe.compare.quick
    tables = {title: find_tasks(names, quick=quick) for title, names in recipe.compare.collections.items()}
    every = [task.name for tasks in tables.values() for task in tasks]
    for place, name in enumerate(every):
        if name in every[:place]:
            raise InputError(f"compare.collections: {name} stands there twice. Leave one out, or rename it.")
    check_instructions(recipe.compare.instructions, [task for tasks in tables.values() for task in tasks])
    revisions = {task.name: task.revision for tasks in tables.values() for task in tasks}
    results = Results(folder, _key(recipe, arms), revisions)
    return Comparison(recipe, recipe.compare, arms, matched_steps(recipe, arms), results, tables)


def _key(recipe: Recipe, arms: Sequence[Arm]) -> str:
    """Hash of what decides a cell's value, besides arm and seed: data by content, model, both stages, the grid."""
    own_arms = recipe.compare.own_arms.values() if recipe.compare else ()
    own = [keys for arm in own_arms for keys in (arm.first, arm.contrast)]
    choosing = {"keep_best": True} if any(keys.get("keep_best") for keys in own) else {}
    cost_only = {
        name: stage.model_copy(update=choosing).cost_only if stage else True
        for name, stage in (("reconstruct", recipe.reconstruct), ("contrast", recipe.contrast))
    }
    values = recipe.model_dump(
        mode="json",
        by_alias=True,
        exclude={
            "output": True,
            "trackers": True,
            "seed": True,
            "data": {"sources": {"__all__": {"path"}}},
            "model": {"device", "weights"} | ({"residual"} if recipe.model.residual == "float32" else set()),
            "compare": {"arms", "seeds", "seeds_of", "own_arms", "collections", "declared", "explore", "notes"},
            **cost_only,
        },
    )
    contents: Values = {source.name: content_key(source.path) for source in recipe.data.sources}
    contents |= _measure_of_compute(recipe.compare, arms) if recipe.compare else {}
    model = Path(recipe.model.name)
    if model.exists():
        values["model"]["name"] = ""  # it is what it holds, wherever it is
        contents["model"] = content_key(model)
    guide = recipe.contrast.guide if recipe.contrast else None
    if guide is not None and Path(guide).exists():
        values["contrast"]["guide"] = ""
        contents["guide"] = content_key(Path(guide))
    return hashlib.sha256(json.dumps([values, contents], sort_keys=True).encode()).hexdigest()


def _measure_of_compute(compare: Compare, arms: Sequence[Arm]) -> Values:
    """What every arm's compute and common settings follow from, where it is not a ready arm or the first seed not 0."""
    primary = next(arm for arm in arms if arm.name == compare.primary)
    own = {"primary": primary.digest} if primary.name in compare.own_arms else {}
    firsts = [compare.seeds[0], compare.seeds_of.get(compare.primary, compare.seeds)[0]]
    return own | ({"first seeds": firsts} if any(firsts) else {})


# --- Running ---------------------------------------------------------------------------------------------------------


def run(comparison: Comparison, say: Callable[[str], None], hours: float | None = None) -> int:
    """Run what is missing, until it is done or no run should start any more; returns how many runs are still missing.

    Args:
        comparison: from `open_comparison`.
        say: for messages.
        hours: start no run after so many hours.
    """
    started = time.monotonic()
    with alone_in(comparison.results.folder):
        comparison.results.read()  # what another process may have added
        missing = comparison.missing()
        for number, one in enumerate(missing):
            if hours is not None and time.monotonic() - started > hours * 3600:
                return len(missing) - number
            left = _hours_left(comparison)
            say(
                f"{one.arm.title}, seed {one.seed}, {one.setting} settings: run {number + 1} of {len(missing)}"
                + (f"; {left}" if left else "")
            )
            _one(comparison, one, say)
            _delete_models(comparison, one)
    return 0


def _one(comparison: Comparison, one: Run, say: Callable[[str], None]) -> None:
    """Train what is not trained yet, evaluate, keep."""
    choice = _choice(comparison, one, say) if one.arm.trained else {}
    own = replace(one, setting=OWN)
    if one.setting == COMMON and choice == _choice(comparison, own, say):
        _keep_as_common(comparison.results, own, one)
        return
    first, folder = _first(comparison, one, say)
    model = _second(comparison, one, first, choice, say) if one.arm.trained else None
    recipe = comparison.recipe.model_copy(update={"seed": one.seed})
    prepared = prepare(recipe, str(model or recipe.model.name))
    stages = {"first": folder, "contrast": model.parent if model else None}
    logs = {stage: read_log(place / "log.jsonl") for stage, place in stages.items() if place is not None}
    models = {"before Stage II": first, "after Stage II": model} if one.arm.trained else {"base": recipe.model.name}
    of_training = {
        "curves": {stage: _curve(log) for stage, log in logs.items()},
        "isotropy": {
            name: _isotropy(prepared, load_embedder(recipe, str(place), recipe.model.device))
            for name, place in models.items()
            if place is not None and len(prepared.split.held_out) > 1
        },
        "made_with": versions()
        | {
            "threads": str(torch.get_num_threads()),
            "matrix products": str(prepared.embedder.dtype).removeprefix("torch."),
        },
    }
    shared: Values = {"kind": "cell", "arm": one.arm.name, "digest": one.arm.digest, "setting": one.setting}
    shared |= {"seed": one.seed, "choice": choice}
    cost = {stage: _cost(log) for stage, log in logs.items()}
    say("evaluating")
    for score, seconds in _evaluate(comparison, one, prepared.embedder):
        cell: Values = {"collection": score.task, "metric": score.metric, "value": score.value}
        cell["cost"] = cost | {"evaluate": {"seconds": seconds}}
        kept = comparison.results.payload(one.name)
        revision = comparison.results.revisions[score.task]
        kept["items"] = kept.get("items", {}) | {score.task: score.items}
        kept["revisions"] = kept.get("revisions", {}) | {score.task: revision}
        comparison.results.keep([shared | cell], one.name, kept | of_training)
    if model:
        shutil.rmtree(model)


def _delete_models(comparison: Comparison, done: Run) -> None:
    """Of an arm and a seed, once no run of theirs is missing: each has half a gigabyte; their recipes make them again.

    What an arm trained before Stage II is kept until then, as its common settings start from it, too.
    """
    if all((run.arm.name, run.seed) != (done.arm.name, done.seed) for run in comparison.missing()):
        for model in _place(comparison, done).glob("*/*/model"):
            shutil.rmtree(model)


def _keep_as_common(results: Results, own: Run, one: Run) -> None:
    """Where the arm's own settings are the common ones, its results are both."""
    done = results.cells(one)
    lines = [line | {"setting": COMMON, "cost": {}} for line in results.of(own) if line["collection"] not in done]
    results.keep(lines, one.name, results.payload(own.name))


def _evaluate(comparison: Comparison, one: Run, embedder: Embedder) -> Iterator[tuple[TaskScore, float]]:
    """Scores of a run on what it lacks, one collection after the other, with the seconds each took."""
    with tempfile.TemporaryDirectory() as vectors:
        adapter = TaskEmbedder(VectorCache(embedder, Path(vectors)), one.name, comparison.settings.instructions)
        for task in comparison.tasks_left(one):
            began = time.perf_counter()
            (score,) = run_tasks(adapter, [task])
            yield score, time.perf_counter() - began


def _first(comparison: Comparison, one: Run, say: Callable[[str], None]) -> tuple[Path | None, Path | None]:
    """Train what an arm does before Stage II: its model and its stage folder, if it does anything."""
    place = _place(comparison, one) / "first"
    derived = first_recipe(comparison.recipe, one.arm, one.seed, comparison.matched[one.arm.name], place)
    if derived is None:
        return None, None
    folder = _trained(derived, place, say)
    return folder / "model", folder


def _second(comparison: Comparison, one: Run, first: Path | None, choice: Values, say: Callable[[str], None]) -> Path:
    """Train Stage II with a choice of settings; returns its model folder."""
    place = _place(comparison, one) / choice_name(choice)
    extra = comparison.matched[one.arm.name]
    start = str(first) if first else None
    derived = contrast_recipe(comparison.recipe, one.arm, one.seed, choice, start, extra, place)
    return _trained(derived, place, say) / "model"


def _trained(recipe: ArmRecipe, place: Path, say: Callable[[str], None]) -> Path:
    """Train a recipe of one stage unless that is done; returns the stage's folder.

    Raises:
        InputError: if what is there has another number of steps, as one that matched the compute of other code has.
    """
    settings: Schedule | None = recipe.reconstruct or recipe.contrast
    folder = place / ("reconstruct" if recipe.reconstruct else "contrast")
    if not (folder / "model" / METADATA).exists():
        _train(recipe, place, say)
    taken = read_log(folder / "log.jsonl")[-1]["step"]
    if settings is not None and taken != settings.steps:
        raise InputError(
            f"{folder}: its model has {taken} steps, this comparison's {settings.steps}. Remove the folder."
        )
    return folder


def _choice(comparison: Comparison, one: Run, say: Callable[[str], None]) -> Values:
    """Stage II's settings of a run: the arm's best on held-out pairs, or the primary arm's."""
    if one.setting == COMMON:
        return _common(comparison, say)
    chooser = one.arm
    possible = choices(comparison.recipe)
    if len(possible) == 1:
        return possible[0]
    seed = seeds_of(comparison.settings, chooser)[0]
    first: Path | None = None
    for choice in untried(comparison, chooser):
        trial = Run(chooser, seed, OWN)
        first = first or _first(comparison, trial, say)[0]
        say(f"{chooser.title}: trying {choice_name(choice)}")
        model = _second(comparison, trial, first, choice, say)
        log = read_log(model.parent / "log.jsonl")
        if "held_out_accuracy" not in log[-1]:
            raise InputError("data: too few pairs to hold any out, by which compare.grid chooses. Leave it out.")
        line = {"kind": "grid", "arm": chooser.name, "digest": chooser.digest, "seed": seed}
        line |= {"choice": choice_name(choice), "value": _accuracy(comparison, chooser, log), "cost": _cost(log)}
        comparison.results.keep([line])
    best = best_choice(comparison, chooser)
    needed = [best] if chooser.name == comparison.settings.primary else [best, _common(comparison, say)]
    for choice in possible:
        if choice not in needed:
            folder = _place(comparison, Run(chooser, seed, OWN)) / choice_name(choice)
            shutil.rmtree(folder / "contrast" / "model", ignore_errors=True)
    return best


def untried(comparison: Comparison, arm: Arm) -> list[Values]:
    """The grid's choices that an arm has not tried yet."""
    done = tried(comparison, arm)
    return [choice for choice in choices(comparison.recipe) if choice_name(choice) not in done]


def tried(comparison: Comparison, arm: Arm) -> dict[str, float]:
    """Held-out accuracy of each choice that an arm has tried, by its name; all are tried with its first seed."""
    return comparison.results.tried(arm, seeds_of(comparison.settings, arm)[0])


def best_choice(comparison: Comparison, arm: Arm) -> Values:
    """The choice with the highest held-out accuracy, the first of equals, once an arm has tried all."""
    accuracy = tried(comparison, arm)
    return max(choices(comparison.recipe), key=lambda choice: accuracy[choice_name(choice)])


def _accuracy(comparison: Comparison, arm: Arm, log: Sequence[Values]) -> float:
    """Held-out accuracy of the model that a training kept: after its last step, or the best with ``keep_best``."""
    settings = comparison.recipe.contrast
    keeps_best = arm.contrast_keys.get("keep_best", settings is not None and settings.keep_best)
    evaluated = [entry for entry in log if "quality" in entry]
    kept = max(evaluated, key=lambda entry: float(entry["quality"])) if keeps_best else log[-1]
    return float(kept["held_out_accuracy"])


def _common(comparison: Comparison, say: Callable[[str], None]) -> Values:
    primary = next(arm for arm in comparison.arms if arm.name == comparison.settings.primary)
    return _choice(comparison, Run(primary, seeds_of(comparison.settings, primary)[0], OWN), say)


def choice_name(choice: Values) -> str:
    """Name of a choice of Stage II's settings, in results and folders."""
    return "-".join(f"{key}={value:g}" for key, value in choice.items()) or "contrast"


def _place(comparison: Comparison, one: Run) -> Path:
    return (
        Path(comparison.recipe.output)
        / comparison.results.key[:8]
        / f"{one.arm.name}-{one.arm.digest}"
        / f"seed-{one.seed}"
    )


def _train(recipe: ArmRecipe, place: Path, say: Callable[[str], None]) -> None:
    """Train a recipe; on the CPU in a process of its own, whose messages and progress bar stay visible."""
    path = place / "recipe.yaml"
    place.mkdir(parents=True, exist_ok=True)
    write_file(path, yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False))
    if find_device(recipe.model.device).type == "cuda":  # one process for all, whose compiled layers serve every run
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train_arm(recipe)
        return
    command = [sys.executable, "-m", "anchorembed", "train-arm", str(path)]
    with _signals() as heard, subprocess.Popen(command) as process:  # noqa: S603 - ourselves
        code = _wait(process, heard)
    number = code - 128 if code > 128 else -code  # of a signal, if the training was ready for one or not yet
    stopped = heard or [number]
    if stopped[0] in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        raise Interrupted(stopped[0], "Stopped.")
    if number == signal.SIGKILL:
        raise InputError(f"{path}: training it was killed, as the system does where memory ends. {LESS_MEMORY}")
    if code:
        raise InputError(f"{path}: training it ended with exit code {code}; its message stands above.")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Keep the numbers of signals that ask to stop, but for those that are ignored, as nohup has it."""
    heard: list[int] = []
    asking = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in asking
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], heard: Sequence[int]) -> int:
    """Until a training has ended; told to stop, it is told so, too, and writes a checkpoint first.

    It is sent SIGTERM, as a terminal sends it SIGINT itself, and a second of those would stop it at once.
    """
    told = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_GLANCE)
        if heard and not told:
            process.terminate()
            told = True


def _cost(log: Sequence[Values]) -> dict[str, float]:
    sums = {key: float(sum(line[key] for line in log)) for key in ("seconds", "tokens", "flops")}
    return sums | {"peak_gb": max(line["peak_gb"] for line in log)}


def _curve(log: Sequence[Values]) -> list[Values]:
    """Losses of every step and held-out metrics, without what only counts cost."""
    left_out = {"seconds", "tokens", "flops", "peak_gb", "learning_rate", "gradient_norm"}
    return [{key: value for key, value in line.items() if key not in left_out} for line in log]


def _isotropy(prepared: Prepared, embedder: Embedder) -> dict[str, float]:
    """Isotropy of a model's vectors of held-out pairs."""
    pairs = prepared.tokens(prepared.split.held_out[:_ISOTROPY_PAIRS].tolist())
    queries = embedder.encode_tokens([pair.query for pair in pairs])
    documents = embedder.encode_tokens([pair.document for pair in pairs])
    return asdict(isotropy(queries.numpy(), documents.numpy()))


# --- The plan --------------------------------------------------------------------------------------------------------


def plan(comparison: Comparison) -> str:
    """What is to be run, in words, with hours where a finished run tells how long such a one takes."""
    missing = comparison.missing()
    runs = list(comparison.runs())
    grid = len(choices(comparison.recipe))
    lines = [f"{len(runs)} runs, {len(runs) - len(missing)} of them done; {grid} choices of settings for each arm"]
    for arm in comparison.arms:
        seeds = ", ".join(map(str, seeds_of(comparison.settings, arm)))
        steps = comparison.matched[arm.name]
        extra = f"{steps} steps {'more of' if arm.longer else 'before'} Stage II" if steps else "Stage II alone"
        lines.append(f"  {arm.name:<18} seeds {seeds:<10}{extra if arm.trained else 'not trained':<28}{arm.what}")
    if left := _hours_left(comparison):
        lines.append(left)
    if comparison.results.others:
        lines.append(f"{comparison.results.others} lines of results are of other settings or data and are left alone")
    return "\n".join(lines)


def _hours_left(comparison: Comparison) -> str:
    """How long what is missing will take, the grid included, by what finished runs took; nothing before the first."""
    results = comparison.results
    done = [
        (run, sum(stage["seconds"] for stage in results.cost(run).values()))
        for run in comparison.runs()
        if results.of(run)
    ]
    if not done:
        return ""
    seconds = sum(_seconds_like(run, done) for run in comparison.missing())
    tried = [line["cost"]["seconds"] for line in results.lines if line["kind"] == "grid"]
    if tried:
        seconds += fmean(tried) * sum(len(untried(comparison, arm)) for arm in comparison.arms if arm.trained)
    return f"about {seconds / 3600:.1f} hours to go, by what finished runs took"


def _seconds_like(wanted: Run, done: Sequence[tuple[Run, float]]) -> float:
    """Mean seconds of finished runs of the same arm and setting; if there are none, of that setting, or of all."""
    same_setting = [(run, seconds) for run, seconds in done if run.setting == wanted.setting]
    same_arm = [seconds for run, seconds in same_setting if run.arm.name == wanted.arm.name]
    return fmean(same_arm or [seconds for _, seconds in same_setting or done])
