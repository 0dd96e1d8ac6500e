"""The functions behind the command line's verbs: each loads a model, reads files, shows progress, returns a value.

Training is in `train.run`, exporting in `export.run`, comparing in `compare.run`.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, product
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
from anchorembed.data.documents import Document, read_corpus, read_texts
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError, extra, first_line
from anchorembed.evaluate.isotropy import Isotropy
from anchorembed.evaluate.isotropy import isotropy as measure_isotropy
from anchorembed.model.embedder import Embedder, describe, find_metadata
from anchorembed.model.existing import find_existing
from anchorembed.model.load import load_config, load_tokenizer
from anchorembed.model.positions import check_lengths
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
    """Hits of one query, and whether the index was there already."""

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
        quick: a fixed part of each task only; its name then ends in ``-quick``.
        out: folder for result files in mteb's form; tasks whose result is there are not run again.
        dimensions: score vectors of so many components, too; texts are embedded once.
        precision: score vectors stored so, too, of each of the dimensions; full float32 vectors always come first.
        on_score: called with each task's score as soon as it is known.

    Raises:
        InputError: for what cannot be evaluated, and where the packages of the extra ``eval`` are not installed.
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
    """How evenly each model's vectors of the first ``most`` pairs of a file fill their space, by model.

    Raises:
        InputError: if there are fewer than two pairs.
    """
    chosen = list(islice(read_pairs(pairs), min(most, sys.maxsize)))
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
    """Report what is in a recipe's pairs, source by source; lines without a usable pair are counted, not refused.

    Args:
        recipe: its model's tokenizer and template count the tokens; its limits say what is cut.
        tests: whose texts should not be trained on, as in `curate.check.check`; the recipe's local ones are added.
    """
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"skip_bad": True})})
    settings = recipe.compare
    named = [name for names in settings.collections.values() for name in names] if settings else []
    named += [name for stage in (recipe.reconstruct, recipe.contrast) if stage for name in stage.evaluate_on]
    paths = {name: Path(name).expanduser() for name in named}
    if elsewhere := [name for name, path in paths.items() if not path.exists()]:
        _log.info(f"not looked into, as they are no files here: {', '.join(elsewhere)}")
    local = dict.fromkeys([*tests, *(path for path in paths.values() if path.exists())])
    tokenizer = load_tokenizer(recipe.model.name)
    name = recipe.model.name
    own = find_metadata(name) or find_existing(name)
    config, lengths = load_config(name), Lengths(recipe.data.query_tokens, recipe.data.document_tokens)
    check_lengths(name, config, lengths)
    model = describe(name, own, config, tokenizer, own_template(recipe))
    store = open_pairs(recipe)
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
    """Write pairs with hard negatives mined for them, as JSONL that trains as it is.

    Args:
        pairs: file, folder or hub data set of pairs, as in `read_pairs`.
        out: JSONL to write, gzipped if its name ends in .gz.
        by: ``bm25``, or a model as in `evaluate`.
        corpus: corpus file to mine from, besides the pairs' positives.
        rules: which texts become negatives.
        rerank: cross-encoder, a local folder or hub id, that scores what is found anew; its logits are written as
            ``scores``, for ``contrast.distill``.
        skip_bad: drop unusable lines, and log how many.

    Raises:
        InputError: for files it cannot use, and where BM25 is asked for without the extra ``mine``.
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
    """Score an embedder on a collection, with a progress bar; its vectors are cached. It needs the extra ``eval``."""
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
        precision: how they are stored: ``float32``, the default, ``int8``, whose ranges are those of the texts, or
            ``binary``, packed bits.
        like: file of vectors of the same model, whose dimensions, precision and ranges are taken.
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
    wanted = Job(str(model), side, instruction, dimensions, precision, read_made_by(Path(like)) if like else None)
    if engine == "local":
        _check_out(out)
    documents = read_texts(Path(texts))
    documents = chain([next(documents)], documents)  # a fault in the first line shows before the model is loaded
    with _bar("embedding", None) as advance:
        if engine == "ray":
            return encode_by_ray(documents, out, wanted, workers=workers, progress=advance)
        embedder = Embedder.load(model)
        says = made_by(embedder, dimensions, precision, wanted.like)
        ids: list[str] = []
        windows = embedder.stream(_texts(documents, ids), side, instruction, progress=advance)
        scales = embedder.metadata.normalize
        batches = (
            vector_batch(_taken(ids, len(window)), cut(window, says.form.dimensions, scales)) for window in windows
        )
        return write_vectors(out, batches, says)


def _check_out(out: Path) -> None:
    """Refuse, before any work, what cannot become a file."""
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

    ``dimensions`` and ``precision`` are of the index's vectors, as in `encode`, with int8's ranges those of the corpus.

    Raises:
        InputError: for a query, corpus or index it cannot use, and where the extra ``search`` is not installed.
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
    """What a text's vector says, or a stored one: its bag's words, and what the decoder writes, beside another text's.

    Args:
        model: as in `evaluate`.
        text: to embed; with ``vectors`` it is only measured how likely the stored vector makes it.
        other: a text to compare with.
        side: query or document.
        vectors: Parquet file as `encode` writes it, of float vectors.
        id_: which vector of that file.

    Raises:
        InputError: as `train.read.read` does, and for a file or id that gives no float vector.
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
    """Yield what moves a progress bar of ``total`` texts or pairs by a number of them; it shows from the first on."""
    with progress_bar() as bar:
        yield lambda done: bar.advance(bar.tasks[0].id if bar.tasks else bar.add_task(name, total=total, note=""), done)


def _taken(ids: list[str], count: int) -> list[str]:
    """The first ids of a list, which then lacks them."""
    done, ids[:] = ids[:count], ids[count:]
    return done


def _texts(documents: Iterator[Document], ids: list[str]) -> Iterator[str]:
    """Yield texts and note their ids."""
    for document in documents:
        ids.append(document.id)
        yield document.text
