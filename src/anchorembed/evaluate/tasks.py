"""Evaluate an embedder on tasks: embed their texts once, score them, keep the results as JSON files in mteb's form."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.progress import Progress, TaskID

from anchorembed.errors import InputError, nearest
from anchorembed.evaluate.metrics import MAIN, Embed, Items, Measured
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats, Side
from anchorembed.search.vector_cache import Texts, VectorCache
from anchorembed.system.files import write_file
from anchorembed.system.progress import progress_bar


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A task's result: its main ``value``, and each item's score, whose mean it is.

    ``items`` is empty where the main score is no mean over items (average precision of pairs), or was read from an
    earlier result. Spearman's items are jackknife pseudo-values (`scoring.pseudo_values`). ``scores`` has all scores as
    mteb's files have them: for each split a list of its subsets' scores by name.
    """

    task: str
    kind: str
    metric: str
    value: float
    items: Items
    scores: Mapping[str, Sequence[Mapping[str, Any]]]


class Adapter:
    """An embedder as tasks see it: it puts their instructions first, and embeds nothing twice."""

    def __init__(self, embedder: Embedder, name: str, vectors: VectorCache, instructions: Mapping[str, str]) -> None:
        self.vectors, self.instructions = vectors, instructions
        self.own_instruction = embedder.metadata.instruction
        self.expect: Callable[[int], None] = lambda _: None  # told how many texts are to be embedded
        self.progress: Callable[[int], None] | None = None  # and how many have been
        self.described: dict[str, Any] = {  # as mteb describes a model
            "name": f"anchorembed/{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'model'}",
            "revision": _revision(embedder, instructions),
            "embed_dim": embedder.dimension,
            "max_tokens": float(embedder.metadata.lengths.document),
            "n_parameters": sum(parameter.numel() for parameter in embedder.parameters()),
            "framework": ["PyTorch"],
            "use_instructions": bool(instructions or self.own_instruction),
        }

    def embed(self, task: str, kind: str, texts: Texts, side: Side) -> Floats:
        """Vectors [N, H] of texts of a task; its instruction goes before all but documents."""
        self.expect(len(texts))
        return self.vectors.vectors(
            texts, side, self._instruction(task, kind) if side == "query" else "", self.progress
        )

    def _instruction(self, task: str, kind: str) -> str:
        for name in (task, task.removesuffix("-quick"), kind, "default"):
            if name in self.instructions:
                return self.instructions[name]
        return self.own_instruction


def _revision(embedder: Embedder, instructions: Mapping[str, str]) -> str:
    """Of what a model is to a task: weights, template, lengths and instructions."""
    if not instructions:
        return embedder.fingerprint[:16]
    told = json.dumps(dict(instructions), sort_keys=True)
    return hashlib.sha256(f"{embedder.fingerprint} {told}".encode()).hexdigest()[:16]


class Task(Protocol):
    """What a model can be evaluated on."""

    @property
    def name(self) -> str:
        """Its name in results."""

    @property
    def kind(self) -> str:
        """Mteb's name for what it asks."""

    @property
    def revision(self) -> str:
        """Which data it has."""

    def run(self, adapter: Adapter, out: Path | None) -> TaskScore:
        """Evaluate; what is in the folder ``out`` already is read."""


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task on local data; ``revision`` is a hash of them, and ``measure`` one of the functions of `scoring`."""

    name: str
    kind: str
    revision: str
    measure: Callable[[Embed], Measured]

    def run(self, adapter: Adapter, out: Path | None) -> TaskScore:
        """Evaluate, or read the result for the same data and model in the folder ``out``."""
        main, metric = MAIN[self.kind]
        path = _folder(out, adapter) / f"{self.name}.json" if out else None
        scores, items = self._kept(path), Items()
        if scores is None:
            began = time.perf_counter()
            measured = self.measure(partial(adapter.embed, self.name, self.kind))
            items = measured.items
            whole = measured.scores | {"main_score": measured.scores[main]}
            scores = {"test": [whole | {"hf_subset": "default", "languages": ["und-Zyyy"]}]}
            if path:
                self._keep(path, scores, time.perf_counter() - began)
                write_file(path.with_name("model_meta.json"), json.dumps(adapter.described, indent=2))
        return TaskScore(self.name, self.kind, metric, float(scores["test"][0]["main_score"]), items, scores)

    def _kept(self, path: Path | None) -> dict[str, list[dict[str, Any]]] | None:
        """The scores of a result for the same data, if there is one that is whole."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            result = json.loads(path.read_text(encoding="utf-8")) if path else {}
            if result["dataset_revision"] == self.revision and isinstance(
                result["scores"]["test"][0]["main_score"], float
            ):
                scores: dict[str, list[dict[str, Any]]] = result["scores"]
                return scores
        return None

    def _keep(self, path: Path, scores: Mapping[str, Any], seconds: float) -> None:
        result: dict[str, Any] = {
            "dataset_revision": self.revision,
            "task_name": self.name,
            "mteb_version": None,
            "scores": scores,
        }
        result |= {"evaluation_time": seconds, "kg_co2_emissions": None, "date": time.time()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(result, indent=2))


def _folder(out: Path, adapter: Adapter) -> Path:
    return out / "results" / str(adapter.described["name"]).replace("/", "__") / str(adapter.described["revision"])


def run_tasks(adapter: Adapter, tasks: Iterable[Task], out: Path | None = None) -> Iterator[TaskScore]:
    """Evaluate on each task, as the scores are asked for.

    Args:
        adapter: the model.
        tasks: from `tasks.find_tasks`.
        out: folder for results in mteb's layout, ``results/MODEL/REVISION/TASK.json``; tasks already there are read.
    """
    for task in tasks:
        with progress_bar() as bar:
            shown = bar.add_task(task.name, total=None, note="")
            adapter.expect = partial(_expect, bar, shown)
            adapter.progress = partial(bar.advance, shown)
            score = task.run(adapter, out)
        yield score


def _expect(bar: Progress, shown: TaskID, count: int) -> None:
    bar.update(shown, total=(bar.tasks[0].total or 0) + count)


def check_instructions(instructions: Iterable[str], tasks: Sequence[Task]) -> None:
    """Raise InputError if an instruction is for a task that is not there."""
    known = {name for task in tasks for name in (task.name, task.kind, "default")}
    for name in instructions:
        if name not in known and f"{name}-quick" not in known:
            raise InputError(f"instructions: {name!r} is no task here.{nearest(name, sorted(known))} Check the name.")


def read_instructions(path: Path) -> dict[str, str]:
    """Read a YAML file of ``task name, task type or default: instruction``.

    Raises:
        InputError: if it is anything else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: cannot be read ({' '.join(str(error).split())}). Write `TASK: instruction`."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(x, str) for pair in values.items() for x in pair):
        raise InputError(f"{path}: not names with instructions. Write lines such as `default: Given a question, ...`.")
    return values
