"""Tasks: how they embed texts, each with its instruction, and how they are run and scored."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.progress import Progress, TaskID

from anchorembed.errors import InputError, decoded, nearest
from anchorembed.evaluate.task_types import Items
from anchorembed.model.truncate_and_quantize import VectorFormat
from anchorembed.model.vectors import Floats, Side
from anchorembed.recipe_file import load_yaml
from anchorembed.search.vector_cache import Texts, VectorCache, made_smaller
from anchorembed.system.files import hash_texts, to_json, write_file
from anchorembed.system.progress import progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A task's result: the ``value`` of its main metric, and the main metric of each of its ``items``.

    ``value`` is nan if undefined, as a correlation is if all pairs are equally near; in JSON it is null. It is the mean
    of ``items``, which are empty if the main metric is not such a mean (average precision of pairs), or if the result
    was read from a file. Spearman's items are `metrics.pseudo_values`. ``scores`` has all metrics as in mteb's files:
    for each split a list of its subsets' metrics by name. ``form`` is the format of the vectors.
    """

    task: str
    kind: str
    metric: str
    value: float
    items: Items
    scores: Mapping[str, Sequence[Mapping[str, Any]]]
    form: VectorFormat


@dataclass(frozen=True, slots=True)
class TaskEmbedder:
    """An embedder as tasks use it: with each task's instruction, and with a cache of vectors.

    ``instructions`` are by task name, task type or ``default``, and replace the embedder's. ``smaller`` is the format
    of vectors, by default float32 and all dimensions. ``expect`` is called with the number of texts to embed,
    ``advance`` with the number done since the last call.
    """

    vectors: VectorCache
    name: str
    instructions: Mapping[str, str]
    smaller: VectorFormat | None = None
    expect: Callable[[int], None] = lambda _: None
    advance: Callable[[int], None] | None = None

    def embed(self, task: str, kind: str, texts: Texts, side: Side) -> Floats:
        """Vectors [N, D] of a task's texts, as restored from storage in `form`; documents get no instruction.

        Queries of a search are not stored: they are cut to the same dimensions and stay float32.
        """
        self.expect(len(texts))
        instruction = self._instruction(task, kind) if side == "query" else None
        vectors_NH = self.vectors.vectors(texts, side, instruction, self.advance)
        if self._is_whole:
            return vectors_NH
        searches = side == "query" and kind.endswith(("Retrieval", "Reranking"))
        form = VectorFormat(self.form.dimensions) if searches else self.form
        return made_smaller(vectors_NH, form, self.vectors.folder)

    @property
    def form(self) -> VectorFormat:
        """The format of stored vectors."""
        return self.smaller or VectorFormat(self.vectors.embedder.dimension)

    @property
    def _is_whole(self) -> bool:
        return self.form == VectorFormat(self.vectors.embedder.dimension)

    def _instruction(self, task: str, kind: str) -> str | None:
        """The instruction given for a task; None for the model's own prompt."""
        for name in (task, task.removesuffix("-quick"), kind, "default"):
            if name in self.instructions:
                return self.instructions[name]
        return None

    @property
    def full_name(self) -> str:
        """Organisation and name, as in mteb; characters that are unsafe in a folder's name become ``-``.

        For smaller vectors the name ends in their format.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "model"
        return f"anchorembed/{name}" + ("" if self._is_whole else f"-{self.form}")

    @property
    def revision(self) -> str:
        """Hash of all that decides vectors: weights, template, lengths, instructions and format."""
        parts = [self.vectors.embedder.fingerprint]
        parts += [json.dumps(dict(self.instructions), sort_keys=True)] if self.instructions else []
        parts += [] if self._is_whole else [str(self.form)]
        return parts[0][:16] if len(parts) == 1 else hash_texts([" ".join(parts)])[:16]

    def description(self) -> dict[str, Any]:
        """The model as mteb describes one."""
        embedder = self.vectors.embedder
        return {
            "name": self.full_name,
            "revision": self.revision,
            "embed_dim": self.form.dimensions,
            "max_tokens": float(embedder.metadata.lengths.document),
            "n_parameters": sum(parameter.numel() for parameter in embedder.parameters()),
            "framework": ["PyTorch"],
            "use_instructions": bool(self.instructions or embedder.metadata.prompts.query),
        }

    def result_file(self, out: Path, task: str) -> Path:
        """Path of a task's result in the folder ``out``, in mteb's layout."""
        return out / "results" / self.full_name.replace("/", "__") / self.revision / f"{task}.json"

    def describe(self, out: Path) -> None:
        """Write `description` beside results in the folder ``out``."""
        write_file(self.result_file(out, "model_meta"), to_json(self.description(), indent=2))


class Task(Protocol):
    """A task that a model can be evaluated on."""

    @property
    def name(self) -> str:
        """Its name in results."""

    @property
    def kind(self) -> str:
        """Its type, by mteb's name."""

    @property
    def revision(self) -> str:
        """Its revision, which differs for other data."""

    def run(self, embedder: TaskEmbedder, out: Path | None) -> TaskScore:
        """Evaluate, or read the result for the same data and model in the folder ``out``."""


def run_tasks(embedder: TaskEmbedder, tasks: Iterable[Task], out: Path | None = None) -> Iterator[TaskScore]:
    """Evaluate on each task, lazily.

    The folder ``out`` has results in mteb's layout, ``results/MODEL/REVISION/TASK.json``; tasks already there are read.
    """
    for task in tasks:
        with progress_bar() as bar:
            row = bar.add_task(task.name, total=None, note="")
            counting_embedder = replace(embedder, expect=partial(_expect, bar, row), advance=partial(bar.advance, row))
            score = task.run(counting_embedder, out)
        if math.isnan(score.value):
            _log.warning("%s: %s is undefined, as the model gives all items the same score", score.task, score.metric)
        yield score


def _expect(bar: Progress, row: TaskID, count: int) -> None:
    bar.update(row, total=(bar.tasks[0].total or 0) + count)


def check_instructions(instructions: Iterable[str], tasks: Sequence[Task]) -> None:
    """Raise InputError if an instruction names no task, task type or ``default``."""
    known = {name for task in tasks for name in (task.name, task.kind, "default")}
    for name in instructions:
        if name not in known and f"{name}-quick" not in known:
            raise InputError(f"instructions: {name!r} is no task here.{nearest(name, sorted(known))} Check the name.")


def read_instructions(path: Path) -> dict[str, str]:
    """Read a YAML file of ``task name, task type or default: instruction``.

    Raises:
        InputError: if the file cannot be read, or holds anything else.
    """
    try:
        values = load_yaml(decoded(path, path.read_bytes()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: cannot be read ({' '.join(str(error).split())}). Write `TASK: instruction`."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(x, str) for pair in values.items() for x in pair):
        raise InputError(f"{path}: not names with instructions. Write lines such as `default: Given a question, ...`.")
    return values
