"""The functions behind the command line's verbs: each loads a model, reads files, shows progress, returns a value.

Training is in `train.run`, export in `export.run`, comparisons in `compare.run`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, product, tee
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anchorembed.config import Recipe
from anchorembed.curate import check as checking
from anchorembed.curate import mine as mining
from anchorembed.curate.check import SourceReport
from anchorembed.curate.mine import Mined, Rules
from anchorembed.curate.rerank import by_cross_encoder
from anchorembed.data.beir import Collection
from anchorembed.data.documents import read_corpus, read_texts
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError, extra, first_line
from anchorembed.evaluate.isotropy import Isotropy
from anchorembed.evaluate.isotropy import isotropy as measure_isotropy
from anchorembed.model.embedder import Embedder, describe, find_metadata
from anchorembed.model.existing import find_existing
from anchorembed.model.load import load_config, load_tokenizer
from anchorembed.model.smaller import StoredPrecision, cut, vector_format, vector_formats
from anchorembed.model.template import bake
from anchorembed.model.tokens import Lengths, PairTokenizer
from anchorembed.model.vectors import Floats, Side
from anchorembed.search.columns import made_by, read_made_by, vector_batch, write_vectors
from anchorembed.search.ray import Job, encode_by_ray
from anchorembed.search.vector_cache import VectorCache
from anchorembed.system.files import cache_folder, hash_texts, write_jsonl
from anchorembed.system.progress import progress_bar
from anchorembed.train.prepare import open_pairs, own_template
from anchorembed.train.read import NEUTRAL, Reading
from anchorembed.train.read import read as read_vector

if TYPE_CHECKING:  # these need packages of an extra, which only the verb that uses them imports
    from anchorembed.evaluate.metrics import RankingScores
    from anchorembed.evaluate.tasks import TaskScore
    from anchorembed.search.index import Hit

_log = logging.getLogger(__name__)

Engine = Literal["local", "ray"]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits of a query, the index's folder, and whether an existing index was reused."""

    hits: "list[Hit]"
    index: Path
    reused: bool


def evaluate(  # noqa: PLR0913 - the options of a verb
    model: str | Path,
    tasks: Sequence[str | Path],
    *,
    split: str = "test",
    instructions: Mapping[str, str] | None = None,
    quick: bool = False,
    out: str | Path | None = None,
    dimensions: Sequence[int] = (),
    precision: Sequence[str] = (),
    on_score: "Callable[[TaskScore], None]" = lambda _: None,
) -> "list[TaskScore]":
    """Score a model on local test folders and files and on mteb's tasks and benchmarks by name.

    Args:
        model: model folder, hub id, ``.gguf`` file or ``smollm2-135m``.
        tasks: as in `find.find_tasks`.
        split: which qrels of a BEIR folder.
        instructions: by task name, task type or ``default``; instead of the model's own. They go before queries and
            before the texts of symmetric tasks, never before documents.
        quick: a fixed part of each task only; the task's name then ends in ``-quick``.
        out: folder for result files in mteb's form; results that are already there are read.
        dimensions: also score vectors cut to these dimensions; texts are embedded once.
        precision: also score vectors stored in these formats; full float32 vectors always come first.
        on_score: called with each task's score as soon as it is known.

    Raises:
        InputError: if a task is unknown or cannot be evaluated, or the extra ``eval`` is not installed.
    """
    with extra("eval"):
        from anchorembed.evaluate.find import find_tasks
        from anchorembed.evaluate.tasks import TaskEmbedder, check_instructions, run_tasks
    chosen = find_tasks([str(task) for task in tasks], split, quick)
    check_instructions(instructions or {}, chosen)
    embedder = Embedder.load(model)
    vectors = VectorCache(embedder, cache_folder() / "vectors")
    name = "-".join(Path(model).parts[-3:]) if Path(model).exists() else str(model)
    whole = TaskEmbedder(vectors, name, instructions or {})
    scores: list[TaskScore] = []
    for task, form in product(chosen, vector_formats(embedder.dimension, dimensions, precision)):
        (score,) = run_tasks(replace(whole, smaller=form), [task], Path(out) if out else None)
        on_score(score)
        scores.append(score)
    return scores


def isotropy(models: Sequence[str | Path], pairs: str | Path, *, most: int = 1000) -> dict[str, Isotropy]:
    """Isotropy of each model's vectors of the first ``most`` pairs of a file, by model.

    Raises:
        InputError: if there are fewer than two pairs.
    """
    chosen = list(islice(read_pairs(pairs), most))
    if len(chosen) < 2:
        raise InputError(f"{pairs}: one pair, which has no other to compare with. Give at least two.")
    by_model: dict[str, Isotropy] = {}
    for model in models:
        embedder = Embedder.load(model)
        with _bar(f"embedding for {model}", 2 * len(chosen)) as advance:
            queries = embedder.encode([pair.query for pair in chosen], "query", progress=advance)
            documents = embedder.encode([pair.positive for pair in chosen], progress=advance)
        by_model[str(model)] = measure_isotropy(queries, documents)
    return by_model


def check(recipe: Recipe, tests: Sequence[Path] = ()) -> Iterator[SourceReport]:
    """Report on a recipe's pairs, source by source; lines without a usable pair are counted, not refused.

    Args:
        recipe: its data, and the model, template and limits by which tokens are counted.
        tests: tests whose texts must not be trained on, as in `curate.check.check`; the recipe's local ones are added.
    """
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"skip_bad": True})})
    named = [name for names in recipe.compare.collections.values() for name in names] if recipe.compare else []
    named += [name for stage in (recipe.reconstruct, recipe.contrast) if stage for name in stage.evaluate_on]
    paths = {name: Path(name).expanduser() for name in named}
    if elsewhere := [name for name, path in paths.items() if not path.exists()]:
        _log.info(f"not looked into, as they are no files here: {', '.join(elsewhere)}")
    local = dict.fromkeys([*tests, *(path for path in paths.values() if path.exists())])
    tokenizer = load_tokenizer(recipe.model.name)
    name = recipe.model.name
    settings = find_metadata(name) or find_existing(name)
    model = describe(name, settings, load_config(name), tokenizer, own_template(recipe))
    store = open_pairs(recipe)
    lengths = Lengths(recipe.data.query_tokens, recipe.data.document_tokens)
    with _bar("checking", len(store)) as advance:
        pair_tokenizer = PairTokenizer(bake(tokenizer, model.template), lengths)
        yield from checking.check(store, pair_tokenizer, model.prompts, local, advance)


def mine(
    pairs: str | Path,
    out: str | Path,
    *,
    by: str | Path = "bm25",
    corpus: str | Path | None = None,
    rules: Rules | None = None,
    rerank: str | Path | None = None,
    skip_bad: bool = False,
) -> Mined:
    """Mine hard negatives, and write the pairs with them as JSONL to train on.

    Args:
        pairs: file, folder or hub data set of pairs, as in `read_pairs`.
        out: JSONL to write, gzipped if its name ends in .gz.
        by: ``bm25``, or a model as in `evaluate`.
        corpus: corpus file to mine from, besides the pairs' positives.
        rules: which texts become negatives.
        rerank: cross-encoder, a local folder or hub id, that scores the candidates again; its logits are written as
            ``scores``, for ``contrast.distill``.
        skip_bad: drop unusable lines, and log how many.

    Raises:
        InputError: if a file cannot be used, or BM25's extra ``mine`` is not installed.
    """
    _check_out(Path(out))
    if Path(out).resolve() in {Path(path).resolve() for path in (pairs, corpus) if path}:
        raise InputError(f"{out}: is what is read. Name another file to write.")
    reranker = by_cross_encoder(rerank) if rerank else None
    store = open_store([SourceFile(str(pairs), pairs)], cache_folder() / "pairs", skip_bad=skip_bad)

    def read() -> Iterator[TextPair]:
        return chain.from_iterable(store.chunks(0))

    pool = mining.gather(read(), (document.text for document in read_corpus(Path(corpus))) if corpus else ())
    if str(by) == "bm25":
        scorer = mining.by_bm25(pool.texts)
        if wordless := sum(not mining.words(pair.query) for pair in read()):
            _log.warning(
                f"{wordless} of {len(store)} queries have no word that BM25 can search by, so no negatives are mined "
                "for them. A model finds some: by=MODEL"
            )
    else:
        embedder = Embedder.load(by)
        with _bar("embedding", len(pool.texts)) as advance:
            scorer = mining.by_embedder(partial(embedder.encode, progress=advance), pool.texts)
    mined = Mined()
    with _bar("mining", len(store)) as advance:
        write_jsonl(Path(out), _rows(mining.mine(read(), pool, scorer, rules or Rules(), mined, reranker), advance))
    return mined


def _rows(pairs: Iterator[TextPair], progress: Callable[[int], None]) -> Iterator[dict[str, object]]:
    """Mined pairs as rows of JSONL."""
    for pair in pairs:
        row: dict[str, object] = {"query": pair.query, "positive": pair.positive, "negative": list(pair.negatives)}
        yield row | ({"scores": list(pair.scores)} if pair.scores else {})
        progress(1)


def score(embedder: Embedder, collection: Collection) -> "RankingScores":
    """Score an embedder on a collection, with a progress bar; vectors are cached. It needs the extra ``eval``."""
    with extra("eval"):
        from anchorembed.evaluate.task_types import evaluate_collection
    vectors = VectorCache(embedder, cache_folder() / "vectors")
    with _bar(f"embedding {collection.name}", len(collection.documents) + len(collection.queries)) as advance:
        return evaluate_collection(lambda texts, side: vectors.vectors(texts, side, None, advance), collection)


def encode(  # noqa: PLR0913 - the options of a verb
    model: str | Path,
    texts: str | Path,
    out: str | Path,
    *,
    side: Side = "document",
    instruction: str | None = None,
    dimensions: int | None = None,
    precision: StoredPrecision | None = None,
    like: str | Path | None = None,
    engine: Engine = "local",
    workers: int | None = None,
) -> int:
    """Embed a file of texts into Parquet with columns ``id`` and ``vector``; returns the number of texts.

    The file's metadata has, under ``anchorembed``, the model's fingerprint, dimensions, precision and int8's ranges.

    Args:
        model: as in `evaluate`.
        texts: JSONL or text file.
        out: file to write; with Ray a folder of parts.
        side: query or document.
        instruction: as in `Embedder.encode`.
        dimensions: components to keep of each vector; by default all.
        precision: format of the vectors: ``float32``, the default, ``int8`` with the ranges of these texts, or
            ``binary``, packed bits.
        like: file of vectors of the same model, whose dimensions, precision and ranges are used.
        engine: ``ray`` for many machines or processes.
        workers: of Ray, as in `search.ray.encode_by_ray`.
    """
    out = Path(out)
    if workers is not None and engine != "ray":
        raise InputError(f"--workers: {workers} has no effect without --engine ray. Add that, or leave workers out.")
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist. Make it, or name another file.")
    if like and (dimensions is not None or precision):
        raise InputError(f"--like: {like} says dimensions and precision. Leave --dimensions and --precision out.")
    job = Job(str(model), side, instruction, dimensions, precision, read_made_by(Path(like)) if like else None)
    if engine == "local":
        _check_out(out)
    documents = read_texts(Path(texts))
    documents = chain([next(documents)], documents)  # a fault in the first line is reported before the model is loaded
    with _bar("embedding", None) as advance:
        if engine == "ray":
            return encode_by_ray(documents, out, job, workers=workers, progress=advance)
        embedder = Embedder.load(model)
        metadata = made_by(embedder, dimensions, precision, job.like)
        documents, embedded = tee(documents)
        windows = embedder.stream((document.text for document in documents), side, instruction, progress=advance)
        dimensions, scales = metadata.form.dimensions, embedder.metadata.normalize
        batches = (
            vector_batch([document.id for document in islice(embedded, len(window))], cut(window, dimensions, scales))
            for window in windows
        )
        return write_vectors(out, batches, metadata)


def _check_out(out: Path) -> None:
    """Refuse a path that cannot be written as a file, before any work."""
    if out.is_dir():
        raise InputError(f"{out}: it is a folder. Name a file.")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{out}: {parent} cannot be written to. Name another place.")


def search(
    model: str | Path,
    corpus: str | Path,
    query: str,
    *,
    index: str | Path | None = None,
    top_k: int = 10,
    dimensions: int | None = None,
    precision: StoredPrecision = "float32",
) -> SearchResult:
    """Search a corpus by meaning; the index is reused if it was made from the same corpus by the same model.

    ``dimensions`` and ``precision`` are those of the index's vectors, as in `encode`; int8's ranges are the corpus's.

    Raises:
        InputError: if query, corpus or index cannot be used, or the extra ``search`` is not installed.
    """
    with extra("search"):
        from anchorembed.search.index import open_or_build
    corpus = Path(corpus)
    if not query.strip() or query.encode(errors="replace").decode() != query:
        raise InputError("search: the query is empty or not Unicode text. Give some words.")
    if top_k < 1:
        raise InputError(f"--top-k: {top_k} is below 1. Ask for at least one hit.")
    if not corpus.is_file():
        raise InputError(f"{corpus}: no such file. Name a JSONL with _id, optional title, and text.")
    embedder = Embedder.load(model)
    form = vector_format(embedder.dimension, dimensions, precision)
    if index is None:
        name = hash_texts([str(corpus.resolve())])[:16]
        index = cache_folder() / "indexes" / f"{name}-{embedder.fingerprint[:16]}-{form}"
    with _bar("indexing", None) as advance:
        opened, reused = open_or_build(embedder, corpus, Path(index), progress=advance, form=form)
    return SearchResult(opened.search(embedder, query, top_k), Path(index), reused)


def read(
    model: str | Path,
    text: str | None = None,
    *,
    other: str = NEUTRAL[0],
    side: Side = "document",
    vectors: str | Path | None = None,
    id_: str | None = None,
) -> Reading:
    """Read a text's vector, or a stored one: its bag's words, and the text that the decoder writes, beside another's.

    Args:
        model: as in `evaluate`.
        text: text to embed; with ``vectors``, the text whose likelihood is measured.
        other: a text to compare with.
        side: query or document.
        vectors: Parquet file of float vectors, from `encode`.
        id_: id of the vector in that file.

    Raises:
        InputError: as `train.read.read` does, or if the file has no float vector with this id.
    """
    vector_H = None
    if vectors is not None:
        if id_ is None:
            raise InputError(f"{vectors}: which vector is to be read? Give its id: --id ID")
        vector_H = _stored_vector(Path(vectors), id_)
    return read_vector(Embedder.load(model), text, other=other, side=side, vector_H=vector_H)


def _stored_vector(path: Path, id_: str) -> Floats:
    """One vector of a Parquet file with columns ``id`` and ``vector``, [H]."""
    if not path.is_file():
        raise InputError(f"{path}: no such file. Name a Parquet file that encode has written.")
    try:
        rows = pq.read_table(path, columns=["id", "vector"], filters=[("id", "==", id_)])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}). Name a Parquet file that encode has written."
        ) from error
    kind = rows.schema.field("vector").type
    if not (hasattr(kind, "value_type") and pa.types.is_floating(kind.value_type)):
        raise InputError(f"{path}: its vectors are {kind}, and only floats can be read. Encode the texts as floats.")
    if not len(rows):
        raise InputError(f"{path}: no vector has the id {id_!r}. Give one that the file has.")
    return np.array(rows["vector"][0].as_py(), np.float32)


def page(run: str | Path, *, pairs: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Write a run's page, one HTML file with scores, curves, searches, maps and what a vector says; returns its path.

    Args:
        run: recipe or output folder, as in `page.of_run.page_of_run`.
        pairs: file of pairs that were not trained on; by default those that the recipe holds out.
        out: file to write; by default ``page.html`` in the output folder.

    Raises:
        InputError: as `page_of_run` does, and where the packages of the extra ``compare`` are not installed.
    """
    with extra("compare"):
        from anchorembed.page.of_run import page_of_run
        from anchorembed.page.write import write_page
    if out is not None:
        _check_out(Path(out))
    shown, output = page_of_run(Path(run), Path(pairs) if pairs else None)
    return write_page(shown, Path(out) if out else output / "page.html")


@contextmanager
def _bar(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar of ``total`` texts or pairs, shown from its first call on."""
    with progress_bar() as bar:
        yield lambda done: bar.advance(bar.tasks[0].id if bar.tasks else bar.add_task(name, total=total, note=""), done)
