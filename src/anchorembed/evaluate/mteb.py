"""mteb's tasks and benchmarks by name, evaluated by mteb: the one file that needs it installed.

mteb searches through `ranking.rank`, so ties at the cut are broken as trec_eval breaks them. Beside mteb's metrics, a
score has the main metric of each query or item, if their mean is the task's.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetsError
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.types import PromptType

from anchorembed.data.beir import Collection
from anchorembed.data.store import StoredDocuments
from anchorembed.errors import InputError, nearest
from anchorembed.evaluate.metrics import pseudo_values
from anchorembed.evaluate.quick import QUICK_DOCUMENTS, quick_items, subset
from anchorembed.evaluate.ranking import Rankings, rank, rank_candidates
from anchorembed.evaluate.task_types import (
    MAIN_METRICS,
    Items,
    StrippedTexts,
    numbered,
    paired_cosines,
    ranking_metrics,
)
from anchorembed.evaluate.tasks import TaskEmbedder, TaskScore
from anchorembed.model.vectors import Floats, Side, unit_rows
from anchorembed.search.vector_cache import Texts
from anchorembed.system.files import to_json, write_file

_ROUNDING = 1e-5  # mteb's metrics have five digits
_SHOWN_METRICS = dict(MAIN_METRICS.values())


@dataclass(frozen=True, slots=True)
class MtebTask:
    """A task of mteb, with its name and type there, and the revision of its data on the hub."""

    name: str
    kind: str
    revision: str
    task: AbsTask

    def run(self, embedder: TaskEmbedder, out: Path | None) -> TaskScore:
        """Evaluate by mteb, or read the result for the same data and model in the folder ``out``."""
        score = _run(self.task, MtebEncoder(embedder), ResultCache(out) if out else None)
        if out is not None and math.isnan(score.value) and (file := embedder.result_file(out, self.name)).is_file():
            # Undefined scores become null: mteb writes NaN, which is not JSON. mteb then measures them again.
            write_file(file, to_json(json.loads(file.read_text(encoding="utf-8")), indent=2))
        return score


def tasks_by_name(name: str, quick: bool) -> list[MtebTask]:
    """Return mteb's task of this name, or the tasks of its benchmark of this name.

    Raises:
        InputError: if there is no such task or benchmark, or it has more than texts.
    """
    try:
        tasks = [mteb.get_task(name)]
    except KeyError:
        tasks = _benchmark(name)
    for task in tasks:
        if unusable := sorted(set(task.metadata.modalities) - {"text"}):
            raise InputError(
                f"{task.metadata.name}: it holds {', '.join(unusable)}; only texts can be embedded. Leave it out."
            )
    tasks = [_shortened(task) for task in tasks] if quick else tasks
    return [
        MtebTask(task.metadata.name, task.metadata.type, str(task.metadata.dataset["revision"]), task) for task in tasks
    ]


def _benchmark(name: str) -> list[AbsTask]:
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    if name in benchmarks:
        return list(benchmarks[name].tasks)
    known = [*benchmarks, *(task.metadata.name for task in mteb.get_tasks())]
    raise InputError(
        f"{name}: neither a folder or file here nor a task or benchmark of mteb.{nearest(name, known)} Check the name."
    )


class MtebEncoder:
    """An embedder with mteb's interfaces: an encoder for pairs and classes, a search engine for queries."""

    def __init__(self, embedder: TaskEmbedder) -> None:
        self.embedder = embedder
        self.mteb_model_meta = ModelMeta.create_empty(embedder.description())  # mteb writes it beside the results
        self.corpus: StoredDocuments  # from `index`, which mteb calls before any search

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
        """Vectors of texts: as documents if mteb says so, else as queries."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self._embed(task_metadata, texts, "document" if prompt_type == PromptType.document else "query")

    def index(self, corpus: Dataset, **kwargs: Any) -> None:  # noqa: ANN401 - mteb's protocol
        """Keep a corpus for `search`: a dataset of ids, texts and maybe titles."""
        self.corpus = _documents(corpus)

    def search(
        self,
        queries: Any,  # noqa: ANN401 - rows with id and text
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,  # noqa: ANN401 - mteb's protocol
    ) -> Rankings:
        """Rank the corpus for each query, or only the candidates that ``top_ranked`` gives it."""
        query_ids = [str(row["id"]) for row in queries]
        queries_QH = self._embed(task_metadata, [_query_text(row) for row in queries], "query")
        documents_DH = self._embed(task_metadata, StrippedTexts(self.corpus), "document")
        if top_ranked is None:
            return rank(queries_QH, documents_DH, query_ids, self.corpus.ids, top_k)
        candidates = {query: [str(document) for document in ranked] for query, ranked in top_ranked.items()}
        return rank_candidates(queries_QH, documents_DH, query_ids, self.corpus.ids, candidates)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Floats:  # noqa: ANN401 - mteb's protocol
        """Cosines of all pairs."""
        cosines: Floats = unit_rows(np.atleast_2d(embeddings1)) @ unit_rows(np.atleast_2d(embeddings2)).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Floats:  # noqa: ANN401 - mteb's protocol
        """Cosine of each pair."""
        return paired_cosines(np.asarray(embeddings1), np.asarray(embeddings2))

    def _embed(self, task: TaskMetadata, texts: Texts, side: Side) -> Floats:
        return self.embedder.embed(task.name, task.type, texts, side)


def _query_text(row: Mapping[str, Any]) -> str:
    """A query as mteb's encoders read it: its text, followed by its own instruction if it has one."""
    return " ".join(filter(None, (str(row["text"]), row.get("instruction"))))


def _documents(data: Dataset) -> StoredDocuments:
    return StoredDocuments(data.with_format("arrow")[:])


def _run(task: AbsTask, encoder: MtebEncoder, cache: ResultCache | None) -> TaskScore:
    name, main = task.metadata.name, task.metadata.main_score
    saved = None
    with suppress(ValueError, TypeError):  # of an incomplete result file, or one with an undefined score
        loaded = cache.load_task_result(name, encoder.mteb_model_meta) if cache else None
        if loaded is not None and math.isfinite(loaded.get_score()):
            saved = loaded
    same_data = saved is not None and saved.dataset_revision == task.metadata.dataset["revision"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as afterwards:
        if is_progress_bar_enabled():
            disable_progress_bar()
            afterwards.callback(enable_progress_bar)
        if not (same_data or task.is_aggregate or task.data_loaded):
            _load(task)  # to score items by its data: mteb unloads data that it loaded
            afterwards.callback(task.unload_data)
        results = mteb.evaluate(
            encoder,
            task,
            cache=cache,
            overwrite_strategy="only-missing" if same_data else "always",  # mteb would reuse a result of other data
            co2_tracker=False,
            prediction_folder=Path(folder),
            show_progress_bar=False,
            encode_kwargs={"batch_size": 4096},
        )
        file = Path(folder) / task.prediction_file_name
        items = _items(task, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    result = results.task_results[0]
    value = math.fsum(items.values()) / len(items) if items else math.nan
    if not abs(value - result.get_score()) <= _ROUNDING:  # the task has rules of its own, such as excluded documents
        items, value = {}, result.get_score()
    metric = _SHOWN_METRICS.get(main, main)
    return TaskScore(name, task.metadata.type, metric, value, items, result.scores, encoder.embedder.form)


def _load(task: AbsTask) -> None:
    """Fetch a task's data from the hub or its cache.

    Raises:
        InputError: if neither has it.
    """
    try:
        task.load_data()
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:  # RuntimeError: data that a script makes
        raise InputError(
            f"{task.metadata.name}: its data cannot be loaded from the hub ({' '.join(str(error).split())}). Check the "
            "network and your access to it, or name a local folder."
        ) from error


def _items(task: AbsTask, saved: Mapping[str, Any]) -> Items:
    """Main metric of each query, pair or text, from mteb's saved predictions; empty if a task has several subsets."""
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
    if main in ("ndcg_at_10", "map_at_1000"):
        return ranking_metrics(predictions, data[hf_split]["relevant_docs"], main).items
    if task.metadata.type == "STS" and main == "cosine_spearman":
        values = pseudo_values(data[hf_split]["score"], predictions["cosine_scores"])
        return numbered(values) if np.isfinite(values).all() else {}
    if isinstance(task, AbsTaskClassification) and task.metadata.type == "Classification" and main == "accuracy":
        labels = np.asarray(data[hf_split][task.label_column_name])
        return numbered((np.asarray(predictions) == labels).mean(0)) if not task.is_cross_validation else {}
    return {}


# --- A part of a task ------------------------------------------------------------------------------------------------


def _shortened(task: AbsTask) -> AbsTask:
    """A copy of a task, as mteb shares its objects, with its data: a fixed part of each split that is evaluated."""
    task, name = copy(task), f"{task.metadata.name}-quick"
    if isinstance(task, AbsTaskAggregate):
        task.tasks = [_shortened(part) for part in task.tasks]
        task.taskname_to_task = {part.metadata.name: part for part in task.tasks}
        task.metadata = task.metadata.model_copy(update={"name": name, "tasks": task.tasks})
        return task
    _load(task)
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(None)
        for splits in task.dataset.values():
            for data in splits.values():
                _shorten_search(task.metadata.name, data)
    else:
        _shorten_splits(task.dataset, set(task.eval_splits))
    task.metadata = task.metadata.model_copy(update={"name": name})
    return task


def _shorten_search(name: str, data: Any) -> None:  # noqa: ANN401 - mteb's dictionary of a split
    if data["top_ranked"] is None:
        qrels = {query: dict(grades) for query, grades in data["relevant_docs"].items()}
        queries = tuple(_documents(data["queries"]))
        part = subset(Collection(name, _documents(data["corpus"]), queries, qrels), QUICK_DOCUMENTS)
        for side, texts in (("corpus", part.documents), ("queries", part.queries)):
            kept = {text.id for text in texts}
            data[side] = data[side].select([row for row, id_ in enumerate(data[side]["id"]) if str(id_) in kept])
        data["relevant_docs"] = part.qrels
    else:
        data["queries"] = data["queries"].select(quick_items(len(data["queries"])))
        kept = set(data["queries"]["id"])
        data["relevant_docs"] = {query: grades for query, grades in data["relevant_docs"].items() if query in kept}


def _shorten_splits(data: Any, splits: set[str]) -> None:  # noqa: ANN401 - mteb nests data sets as each task likes
    for name, value in data.items():
        if isinstance(value, Dataset):
            if name in splits:
                data[name] = value.select(quick_items(len(value)))
        else:
            _shorten_splits(value, splits)
