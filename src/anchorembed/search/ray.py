"""Embed a corpus on many machines: Ray Data hands parts of it to workers, each with its copy of the model.

A part is a Parquet file of texts. Its vectors become a Parquet file of the same name, written whole or not at all. If a
worker dies, its part is repeated. The output folder and the model must have the same path on all machines.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anchorembed.data.documents import Document
from anchorembed.errors import InputError, extra, first_line
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import absolute_name, load_tokenizer
from anchorembed.model.vectors import Side
from anchorembed.search.columns import MadeBy, made_by, vector_batch, write_vectors
from anchorembed.system.files import whole_folder

PART = 1024  # texts in a part
_TRIES = 4  # for each part


@dataclass(frozen=True, slots=True)
class Job:
    """How texts are embedded, and vectors stored: as those of ``like``, or by dimensions and precision."""

    model: str
    side: Side = "document"
    instruction: str | None = None
    dimensions: int | None = None
    precision: str | None = None
    like: MadeBy | None = None


class Worker:
    """Loads the model in a process of Ray and embeds parts of ``texts`` into ``vectors``."""

    def __init__(self, job: Job, texts: Path, vectors: Path) -> None:
        self.job, self.texts, self.vectors = job, texts, vectors
        self.embedder = Embedder.load(job.model)

    def __call__(self, row: dict[str, str]) -> dict[str, int]:
        """Embed the part that ``row`` names; returns its number of texts."""
        table, job = pq.read_table(self.texts / row["part"]), self.job
        metadata = made_by(self.embedder, job.dimensions, job.precision, job.like)
        texts, dimensions = table["text"].to_pylist(), metadata.form.dimensions
        vectors_ND = self.embedder.encode(texts, job.side, job.instruction, dimensions=dimensions)
        batch = vector_batch(table["id"].to_pylist(), vectors_ND)
        return {"rows": write_vectors(self.vectors / row["part"], [batch], metadata)}


def encode_by_ray(
    documents: Iterable[Document],
    out: Path,
    job: Job,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    part: int = PART,
) -> int:
    """Embed documents into a folder of Parquet parts with columns ``id`` and ``vector``; returns their number.

    The cluster is that of ``RAY_ADDRESS``, or one started on this machine.

    Args:
        documents: streamed.
        out: folder to write, whole or not at all; it must not exist.
        job: how texts are embedded; its model must be the same on all machines.
        workers: processes, each with the model; by default one a GPU, or one a machine if there is no GPU.
        progress: called with the number of texts done since the last call.
        part: texts in a part.

    Raises:
        InputError: if Ray is not installed, the folder exists, vectors are to be int8 without ranges, or Ray cannot
            finish.
    """
    if job.precision == "int8" and job.like is None:
        raise InputError(
            "--engine ray: int8 needs the ranges of all vectors, which no part has. Encode some of the texts with "
            "--engine local --precision int8, and name their file as --like."
        )
    if out.exists():
        raise InputError(f"{out}: is there already. Name another folder, or delete it.")
    with extra("ray"):
        import ray  # noqa: PLC0415 - an extra
    load_tokenizer(job.model)  # so that a wrong name is reported at once
    job = replace(job, model=absolute_name(job.model))  # workers run in another folder
    with whole_folder(out, new=True) as vectors:
        texts = vectors / "texts"
        texts.mkdir()
        sizes = dict(_write_parts(documents, texts, part))
        _run(ray, list(sizes), (job, texts, vectors), workers, progress)
        _check(vectors, sizes)
        shutil.rmtree(texts)
        for unfinished in vectors.glob(".*"):  # left by workers that died
            unfinished.unlink()
    return sum(sizes.values())


def _write_parts(documents: Iterable[Document], folder: Path, size: int) -> Iterator[tuple[str, int]]:
    """Write documents as parts; yields their names and sizes."""
    remaining, number = iter(documents), 0
    while group := list(islice(remaining, size)):
        name = f"part-{number:06d}.parquet"
        columns = {"id": [document.id for document in group], "text": [document.text for document in group]}
        pq.write_table(pa.table(columns), folder / name)
        yield name, len(group)
        number += 1


def _run(
    ray: Any,  # noqa: ANN401 - a module
    parts: list[str],
    arguments: tuple[Job, Path, Path],
    workers: int | None,
    progress: Callable[[int], None],
) -> None:
    """Embed the parts by workers; ``arguments`` are those of `Worker`."""
    is_started_here = not ray.is_initialized()
    try:
        if is_started_here:
            _start(ray, os.environ.get("RAY_ADDRESS") or "local")
        context = ray.data.DataContext.get_current()  # imports Ray Data, which sets the level of its log
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs each execution
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # a part may take long
        count, share = _share(ray, workers)
        rows = ray.data.from_items([{"part": name} for name in parts], override_num_blocks=len(parts))
        # Ray Data 2.64 will not take max_task_retries, and names nothing to use instead.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            done = rows.map(
                Worker,
                fn_constructor_args=arguments,
                compute=ray.data.ActorPoolStrategy(size=count),
                max_task_retries=_TRIES - 1,
                **share,
            )
        for row in done.iter_rows():
            progress(int(row["rows"]))
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise InputError(f"--engine ray: {_reason(str(error))} Nothing is written.") from error
    finally:
        if is_started_here:
            ray.shutdown()


def _start(ray: Any, address: str) -> None:  # noqa: ANN401 - as above
    """Connect to the cluster at an address, or start one on this machine."""
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except ValueError as error:
        raise InputError(
            f"RAY_ADDRESS: {address!r} is no address for Ray ({first_line(error)}). Set auto or HOST:PORT, or unset it."
        ) from error


def _reason(message: str) -> str:
    """The part of Ray's message for the user: a worker's InputError if there is one, else the last line."""
    lines = message.strip().splitlines() or ["no message"]
    input_errors = (line.partition(f"{InputError.__name__}: ")[2] for line in lines)
    return next(filter(None, input_errors), lines[-1])


def _share(ray: Any, workers: int | None) -> tuple[int, dict[str, float]]:  # noqa: ANN401 - as above
    """Number of workers, and the GPUs or CPUs that each asks Ray for.

    By default there is one worker a GPU, or one a machine if there is no GPU.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if gpus:
        count = workers or gpus
        return count, {"num_gpus": 1 / -(-count // gpus)}
    cpus = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]  # a head node may offer none
    if not cpus:
        raise InputError("--engine ray: no machine of the cluster offers a CPU or a GPU. Start Ray with some.")
    count = workers or len(cpus)
    return count, {"num_cpus": max(1, min(cpus) // -(-count // len(cpus)))}


def _check(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse an output whose parts differ from the input's in name or number of texts."""
    written = {file.name: pq.read_metadata(file).num_rows for file in folder.glob("part-*.parquet")}
    if written != sizes:
        raise InputError(f"--engine ray: {len(written)} of {len(sizes)} parts came back whole. Run it again.")
