"""Evaluate an embedder on tasks through mteb's public API: its protocols, its scores, its JSON.

The search is our own exact one (`evaluation.rank`), so ties at the cut fall as trec_eval breaks them. Beside mteb's
scores stand those of each query or item, whose mean is the task's main score, for paired tests.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import mteb
import numpy as np
import yaml
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from mteb.abstasks import AbsTask, AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult
from mteb.types import PromptType
from scipy.stats import rankdata

from anchorembed.embedder import Embedder, Side
from anchorembed.errors import InputError, nearest
from anchorembed.evaluation import Run, per_query, rank
from anchorembed.progress import progress_bar
from anchorembed.similarity import Floats, cosines, unit_rows
from anchorembed.tasks import StoredDocuments, find_tasks, load
from anchorembed.vectors import Texts, VectorCache

# mteb's name of a main score -> the field's name
METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP",
    "cosine_spearman": "Spearman",
    "accuracy": "accuracy",
    "max_ap": "AP",
}
_MEASURES = {"ndcg_at_10": ir_measures.nDCG @ 10, "map_at_1000": ir_measures.AP @ 1000}

_ROUNDED = 1e-5  # mteb's scores have five digits

Items = dict[str, float]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A task's result: its main ``value``, and each item's score, whose mean it is.

    ``items`` is empty where the main score is no mean over items (average precision of pairs), or was read from an
    earlier result. Spearman's items are jackknife pseudo-values (`pseudo_values`).
    """

    task: str
    kind: str
    metric: str
    value: float
    items: Items
    result: TaskResult


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of documents, read as they are gone through."""

    documents: StoredDocuments

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[str]:
        return (document.text.strip() for document in self.documents)


class Adapter:
    """An embedder as mteb sees it: an encoder for pairs and classes, a search engine for queries."""

    def __init__(self, embedder: Embedder, name: str, vectors: VectorCache, instructions: Mapping[str, str]) -> None:
        self.vectors, self.instructions = vectors, instructions
        self.own_instruction = embedder.metadata.instruction
        self.expect: Callable[[int], None] = lambda _: None  # told how many texts are to be embedded
        self.progress: Callable[[int], None] | None = None  # and how many have been
        self.corpus: StoredDocuments  # from `index`, which mteb calls before any search
        self.meta = ModelMeta.create_empty(
            {
                "name": f"anchorembed/{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'model'}",
                "revision": _revision(embedder, instructions),
                "embed_dim": embedder.dimension,
                "max_tokens": float(embedder.metadata.lengths.document),
                "n_parameters": sum(parameter.numel() for parameter in embedder.parameters()),
                "framework": ["PyTorch"],
                "use_instructions": bool(instructions or self.own_instruction),
            }
        )

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb writes beside the results."""
        return self.meta

    def encode(
        self,
        inputs: Any,  # noqa: ANN401 - a DataLoader of dictionaries with a list of texts
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,  # noqa: ANN401 - mteb's protocol
    ) -> Floats:
        """Vectors of texts; an instruction goes before all but documents."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self._embed(texts, "document" if prompt_type == PromptType.document else "query", task_metadata)

    def index(self, corpus: Any, **kwargs: Any) -> None:  # noqa: ANN401 - mteb's protocol
        """Take a corpus to search: a dataset of ids, texts and maybe titles."""
        self.corpus = StoredDocuments(corpus)

    def search(
        self,
        queries: Any,  # noqa: ANN401 - rows with id and text
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,  # noqa: ANN401 - mteb's protocol
    ) -> Run:
        """Rank the corpus for each query, or only the candidates ``top_ranked`` gives it."""
        asked = [(str(row["id"]), _query_text(row)) for row in queries]
        queries_QH = self._embed([text for _, text in asked], "query", task_metadata)
        documents_DH = self._embed(_Texts(self.corpus), "document", task_metadata)
        ids = self.corpus.ids
        if top_ranked is None:
            return rank(queries_QH, documents_DH, [name for name, _ in asked], ids, top_k)
        rows = {name: row for row, name in enumerate(ids)}
        run: Run = {}
        for (name, _), query_H in zip(asked, unit_rows(queries_QH), strict=True):
            candidates = [str(candidate) for candidate in top_ranked.get(name, ())]
            scores = cosines(query_H, unit_rows(documents_DH[[rows[candidate] for candidate in candidates]]))
            run[name] = dict(zip(candidates, scores.tolist(), strict=True))
        return run

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Floats:  # noqa: ANN401 - mteb's protocol
        """Cosines of all pairs."""
        similar: Floats = unit_rows(np.atleast_2d(embeddings1)) @ unit_rows(np.atleast_2d(embeddings2)).T
        return similar

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Floats:  # noqa: ANN401 - mteb's protocol
        """Cosine of each pair."""
        similar: Floats = (unit_rows(np.asarray(embeddings1)) * unit_rows(np.asarray(embeddings2))).sum(-1)
        return similar

    def _embed(self, texts: Texts, side: Side, task: TaskMetadata) -> Floats:
        instruction = "" if side == "document" else self._instruction(task)
        self.expect(len(texts))
        return self.vectors.vectors(texts, side, instruction, self.progress)

    def _instruction(self, task: TaskMetadata) -> str:
        for name in (task.name, task.name.removesuffix("-quick"), task.type, "default"):
            if name in self.instructions:
                return self.instructions[name]
        return self.own_instruction


def _revision(embedder: Embedder, instructions: Mapping[str, str]) -> str:
    """Of what a model is to a task: weights, template, lengths and instructions."""
    if not instructions:
        return embedder.fingerprint[:16]
    told = json.dumps(dict(instructions), sort_keys=True)
    return hashlib.sha256(f"{embedder.fingerprint} {told}".encode()).hexdigest()[:16]


def _query_text(row: Mapping[str, Any]) -> str:
    """A query as mteb's encoders read it: its own instruction, where a task has one each, follows the text."""
    return " ".join(filter(None, (str(row["text"]), row.get("instruction"))))


def run_tasks(adapter: Adapter, tasks: Iterable[AbsTask], out: Path | None = None) -> Iterator[TaskScore]:
    """Evaluate on each task, as the scores are asked for.

    Args:
        adapter: the model.
        tasks: from `tasks.find_tasks`.
        out: folder for results in mteb's layout, ``results/MODEL/REVISION/TASK.json``; tasks already there are read.
    """
    for task in tasks:
        yield _run_task(adapter, task, out)


def check_instructions(instructions: Iterable[str], tasks: Sequence[AbsTask]) -> None:
    """Raise InputError if an instruction is for a task that is not there."""
    known = {name for task in tasks for name in (task.metadata.name, task.metadata.type, "default")}
    for name in instructions:
        if name not in known and f"{name}-quick" not in known:
            raise InputError(f"instructions: {name!r} is no task here.{nearest(name, sorted(known))} Check the name.")


def measure_on(names: Sequence[str]) -> Callable[[Embedder], Items]:
    """A function of an embedder as it is now that gives each task's main score; for use while it trains."""
    tasks = find_tasks(names)

    def measure(embedder: Embedder) -> Items:
        now = Embedder(
            embedder.backbone, embedder.tokenizer, embedder.metadata
        )  # whose fingerprint is of these weights
        now.dtype = embedder.dtype
        with tempfile.TemporaryDirectory() as folder:
            scores = run_tasks(Adapter(now, "training", VectorCache(now, Path(folder)), {}), tasks)
            return {f"{score.task} {score.metric}": score.value for score in scores}

    return measure


def _run_task(adapter: Adapter, task: AbsTask, out: Path | None) -> TaskScore:
    name, cache = task.metadata.name, ResultCache(out) if out else None
    kept = None
    with suppress(ValueError):  # a result cut short is none
        kept = cache.load_task_result(name, adapter.meta) if cache else None
    same = kept is not None and kept.dataset_revision == task.metadata.dataset["revision"]
    with tempfile.TemporaryDirectory() as folder, _quiet(), progress_bar() as bar:
        shown = bar.add_task(name, total=None, note="")
        adapter.expect = lambda count: bar.update(shown, total=(bar.tasks[0].total or 0) + count)
        adapter.progress = lambda done: bar.advance(shown, done)
        with nullcontext() if same or task.is_aggregate else _loaded(task):
            found = mteb.evaluate(
                adapter,
                task,
                cache=cache,
                overwrite_strategy="only-missing" if same else "always",  # mteb itself would reuse one of other data
                co2_tracker=False,
                prediction_folder=Path(folder),
                show_progress_bar=False,
                encode_kwargs={"batch_size": 4096},
            )
            predictions = Path(folder) / task.prediction_file_name
            saved = json.loads(predictions.read_text(encoding="utf-8")) if predictions.exists() else {}
            items = _items(task, saved)
    result, main = found.task_results[0], task.metadata.main_score
    value = math.fsum(items.values()) / len(items) if items else math.nan
    if not abs(value - result.get_score()) <= _ROUNDED:  # a task with rules of its own, such as what it leaves out
        items, value = {}, result.get_score()
    return TaskScore(name, task.metadata.type, METRIC_NAMES.get(main, main), value, items, result)


@contextmanager
def _loaded(task: AbsTask) -> Iterator[None]:
    """Hold a task's data, by which items are scored, as long as it is needed: mteb drops what it loaded itself."""
    before = task.data_loaded
    if not before:
        load(task)
    try:
        yield
    finally:
        if not before:
            task.unload_data()


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars of datasets silent beside ours."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


# --- Scores of single items ------------------------------------------------------------------------------------------


def _items(task: AbsTask, saved: Mapping[str, Any]) -> Items:
    """Scores of queries, pairs or texts whose mean is the main score; none of other kinds, or of several subsets."""
    parts = {
        (hf_subset, hf_split): predictions
        for hf_subset, splits in saved.items()
        if hf_subset != "mteb_model_meta"
        for hf_split, predictions in splits.items()
    }
    if len(parts) != 1 or task.dataset is None:
        return {}
    ((hf_subset, hf_split), predictions) = next(iter(parts.items()))
    data: Any = task.dataset
    data = data.get(hf_subset, data)
    main = task.metadata.main_score
    if main in _MEASURES:
        return per_query(predictions, data[hf_split]["relevant_docs"], _MEASURES[main])
    if task.metadata.type == "STS" and main == "cosine_spearman":
        values = pseudo_values(data[hf_split]["score"], predictions["cosine_scores"])
        return _numbered(values) if np.isfinite(values).all() else {}
    if isinstance(task, AbsTaskClassification) and task.metadata.type == "Classification" and main == "accuracy":
        labels = np.asarray(data[hf_split][task.label_column_name])
        return _numbered((np.asarray(predictions) == labels).mean(0)) if not task.is_cross_validation else {}
    return {}


def pseudo_values(first: Sequence[float], second: Sequence[float]) -> Array:
    """What each of N pairs of values does to Spearman's correlation, [N]; their mean is the correlation.

    Jackknife pseudo-values, N times the correlation less N - 1 times that without the pair (Miller, 1974), shifted by
    their small bias. Their spread is the correlation's own, so that a bootstrap of their mean has its interval; the
    products of standardised ranks, whose mean is the correlation too, spread more the higher it is. Of a list that is
    constant, or is so without one pair, all are nan.
    """
    pairs_2N = np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)])
    ranks_2N = rankdata(pairs_2N, axis=1)
    without = np.empty(len(first))
    for place, pair in enumerate(pairs_2N.T):
        above, tied = pairs_2N > pair[:, None], pairs_2N == pair[:, None]
        without[place] = _correlation(np.delete(ranks_2N - above - 0.5 * tied, place, axis=1))
    values: Array = _correlation(ranks_2N) + (len(without) - 1) * (without.mean() - without)
    return values


def _correlation(rows_2N: Array) -> float:
    centred = rows_2N - rows_2N.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    return float(centred[0] @ centred[1] / lengths.prod()) if lengths.all() else math.nan


def _numbered(values: Array) -> Items:
    return {str(number): float(value) for number, value in enumerate(values)}
