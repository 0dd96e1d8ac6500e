"""An embedder for documents without queries: write queries, keep the useful ones, train, measure whether it helped.

The output folder has ``data/queries.jsonl`` as written, ``data/pairs.jsonl`` to train on, ``data/held-out-documents``
(a BEIR folder: queries of the held-out documents, over the whole corpus), and ``recipe.yaml`` for `train`.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anchorembed.curate.keep_queries import LOST, Query, drop_useless, held_out_rows, is_retrieved
from anchorembed.curate.mine import by_bm25, by_embedder
from anchorembed.curate.prompt import Prompt, read_prompt
from anchorembed.curate.write_queries import Written, write_queries
from anchorembed.curate.writers import EndpointWriter, ModelWriter, Writer
from anchorembed.data.beir import write_collection
from anchorembed.data.documents import Document, read_texts
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.recipe_schema import Recipe, expanded
from anchorembed.system.files import check_writable, hash_content, lock_folder, whole_file, whole_folder, write_jsonl
from anchorembed.system.progress import progress_bar
from anchorembed.train.default_recipe import with_default_contrast
from anchorembed.train.kept_recipe import KEPT, check_kept
from anchorembed.train.prepare import load_embedder
from anchorembed.train.resume_plan import trained_content
from anchorembed.train.run import STAGES, train

_log = logging.getLogger(__name__)

_QUERIES, _PAIRS = "queries.jsonl", "pairs.jsonl"  # files in the data folder
_SOURCE = "written"  # name of the pairs in the recipe


@dataclass(frozen=True, slots=True)
class Writing:
    """How queries are written and which are kept.

    Attributes:
        url: of an OpenAI-compatible endpoint; without it the base model writes.
        model: name of the endpoint's model.
        prompt: file of the prompt; by default the package's own.
        count: queries of a document.
        temperature: of the writer; 0 is greedy.
        seed: of the writer.
        found_by: search that must find a query's document: ``bm25``, or a model, such as the base model.
        found_in: last rank, from 1, at which the document may be found.
        held_out: documents to test on, at most a fifth of all.
    """

    url: str | None = None
    model: str | None = None
    prompt: Path | None = None
    count: int = 2
    temperature: float = 0.3
    seed: int = 0
    found_by: str = "bm25"
    found_in: int = 10
    held_out: int = 200

    def __post_init__(self) -> None:
        if (self.url is None) != (self.model is None):
            raise InputError("--writer and --writer-model: give both, an address and a model's name there, or neither.")
        for name, value in (("--queries", self.count), ("--found-in", self.found_in), ("--held-out", self.held_out)):
            if value < 1:
                raise InputError(f"{name}: {value} is below 1. Give 1 or more.")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"--temperature: {self.temperature} is not between 0 and 2. 0 is greedy.")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The trained model's folder, and numbers of queries: written, dropped by reason, and kept."""

    model: Path
    recipe: Path
    written: Written
    dropped: Mapping[str, int]
    pairs: int
    test_queries: int

    def __str__(self) -> str:
        lines = [str(self.written)]
        lines += [f"{count:>9,} dropped: {reason}" for reason, count in self.dropped.items()]
        lines += [f"{self.pairs:>9,} pairs to train on", f"{self.test_queries:>9,} queries of held-out documents"]
        return "\n".join([*lines, f"recipe: {self.recipe}", f"model:  {self.model}"])


def fit(
    corpus: str | Path, base: str, output: str | Path, *, writing: Writing | None = None, overrides: Sequence[str] = ()
) -> Fitted:
    """Train an embedder on documents alone; a repeated call continues after the last finished part.

    Args:
        corpus: JSONL with ``text`` and optional ``_id``; or ``.txt``, a text a line.
        base: the decoder to start from, which also writes the queries unless ``writing`` names an endpoint.
        output: folder of data, recipe and models.
        writing: how queries are written and kept.
        overrides: ``a.b=value`` of the recipe.

    Raises:
        InputError: if an argument cannot be used, before anything is written; if too few queries are kept; or if a
            model was trained on other pairs in the output folder, before those are overwritten.
    """
    writing = writing or Writing()
    recipe = recipe_of(base, Path(output), 1, overrides)
    output = Path(expanded(output))  # as the recipe reads it
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"fit: run it in one process, then train {recipe.output / KEPT} with your launcher.")
    for name in (_QUERIES, _PAIRS):
        check_writable(output / "data" / name, corpus, writing.prompt)
    prompt = read_prompt(writing.prompt)
    documents = _read(Path(corpus))
    load_embedder(recipe, recipe.model.name, recipe.model.device)  # refused now, not after queries are written
    if writing.found_by != "bm25":
        Embedder.load(writing.found_by)
    texts = [document.text for document in documents]
    with lock_folder(output / "data"):
        written = _write(documents, writing, base, prompt, output / "data" / _QUERIES)
        kept, dropped = drop_useless(written.queries, texts)
        held_out = held_out_rows(texts, writing.held_out)
        to_train = [query for query in kept if query.row not in held_out]
        to_test = list({query.row: query for query in reversed(kept) if query.row in held_out}.values())[::-1]
        pairs = _retrieving_their_document(to_train, texts, writing)
        dropped[LOST] = len(to_train) - len(pairs)
        if len(pairs) < 2 or len(to_test) < 2:
            reasons = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.items() if count)
            raise InputError(
                f"{corpus}: {len(pairs)} queries to train on and {len(to_test)} to test on are left, of {len(texts)} "
                f"documents ({reasons}); 2 of each are needed. Give more documents, or change --prompt."
            )
        recipe = recipe_of(base, output, len(pairs), overrides)
        rows = ({"query": query.text, "positive": texts[query.row]} for query in pairs)
        with whole_file(output / "data" / _PAIRS) as unfinished:
            write_jsonl(unfinished, rows)
            _check_trained_on(unfinished, recipe, output / "data" / _QUERIES)
        queries = (
            (Document(f"q{number}", query.text), documents[query.row].id) for number, query in enumerate(to_test)
        )
        with whole_folder(output / "data" / "held-out-documents") as folder:
            write_collection(folder, documents, queries)
        check_kept(recipe)
    model = train(recipe)
    return Fitted(model, recipe.output / KEPT, written, dropped, len(pairs), len(to_test))


def recipe_of(base: str, output: Path, pairs: int, overrides: Sequence[str]) -> Recipe:
    """The recipe for ``pairs`` pairs: contrastive learning alone, evaluated on the held-out documents' queries."""
    source = {"name": _SOURCE, "path": str(output / "data" / _PAIRS)}
    values: dict[str, Any] = {
        "data": {"sources": [source], "query_tokens": 128, "held_out": 0},
        "model": {"name": base},
        "contrast": {"evaluate_on": [str(output / "data" / "held-out-documents")]},
        "output": str(output),
    }
    return with_default_contrast(values, pairs, "recipe", overrides)


def _check_trained_on(pairs: Path, recipe: Recipe, queries: Path) -> None:
    """Refuse pairs that differ from those that a stage of the recipe was begun with."""
    content, folders = hash_content(pairs), [recipe.output / stage for stage in STAGES]
    if begun := [folder for folder in folders if trained_content(folder, _SOURCE) not in (None, content)]:
        raise InputError(
            f"{begun[-1]}: trained on other pairs than this command makes now, and kept with those. Choose another "
            f"--output, with a copy of {queries} in its data folder, so that no query is written twice; or delete "
            f"{', '.join(map(str, begun))} and {recipe.output / KEPT}."
        )


def _read(corpus: Path) -> list[Document]:
    """Documents with text, each text once."""
    read = list(read_texts(corpus))
    by_text = {" ".join(document.text.split()): document for document in reversed(read)}
    by_text.pop("", None)
    documents = list(by_text.values())[::-1]
    if len(documents) < len(read):
        _log.info("%s: %s documents are empty or the same as another, and left out", corpus, len(read) - len(documents))
    if broken := [document.id for document in documents if re.search(r"[\t\r\n]", document.id)]:
        raise InputError(
            f"{corpus}: the _id {broken[0]!r} has a tab or line break, which judgements cannot hold. Change it."
        )
    if len(documents) < 10:
        raise InputError(f"{corpus}: {len(documents)} different documents. Give at least 10, of which 2 are held out.")
    return documents


def _write(documents: Sequence[Document], writing: Writing, base: str, prompt: Prompt, file: Path) -> Written:
    """Have queries written, with a progress bar; a repeated call continues after the last batch."""
    writer: Writer
    if writing.url is None or writing.model is None:
        writer = ModelWriter(base, writing.temperature, writing.seed)
    else:
        writer = EndpointWriter(writing.url, writing.model, writing.temperature, writing.seed)
    with progress_bar() as bar:
        task = bar.add_task("writing queries", total=len(documents), note="")
        spent = [0, 0]

        def advance(done: int, read: int, wrote: int) -> None:
            spent[:] = [spent[0] + read, spent[1] + wrote]
            bar.update(task, advance=done, note=f"{spent[0]:,} tokens read, {spent[1]:,} written")

        written = write_queries(documents, writer, prompt, writing.count, file, advance)
    _log.info("%s", written)
    return written


def _retrieving_their_document(queries: Sequence[Query], texts: Sequence[str], writing: Writing) -> list[Query]:
    """The queries whose document the search finds."""
    if writing.found_by == "bm25":
        scorer = by_bm25(texts)
    else:
        scorer = by_embedder(Embedder.load(writing.found_by).encode, texts)
    with progress_bar() as bar:
        task = bar.add_task("searching", total=len(queries), note="")
        is_kept = is_retrieved(queries, len(texts), scorer, writing.found_in, partial(bar.advance, task))
    return [query for query, keep in zip(queries, is_kept, strict=True) if keep]
