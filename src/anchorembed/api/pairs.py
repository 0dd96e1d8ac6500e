"""Check pairs, and mine hard negatives for them: `check` and `mine`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from anchorembed.curate import check as checking
from anchorembed.curate import mine as mining
from anchorembed.curate.check import SourceReport
from anchorembed.curate.mine import Mined, Rules
from anchorembed.curate.rerank import by_cross_encoder
from anchorembed.data.documents import read_corpus
from anchorembed.data.formats import suffix_of
from anchorembed.data.pairs import TextPair
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.load import load_config, load_tokenizer
from anchorembed.model.metadata import describe, find_metadata
from anchorembed.model.positions import check_lengths
from anchorembed.model.sentence_transformers_settings import find_embedder_settings
from anchorembed.model.template import bake
from anchorembed.model.tokens import Lengths, PairTokenizer
from anchorembed.recipe_schema import Recipe
from anchorembed.system.files import cache_folder, check_outside, check_writable, write_jsonl
from anchorembed.system.progress import counting_bar
from anchorembed.train.prepare import open_pairs, own_template

_log = logging.getLogger(__name__)


def check(recipe: Recipe, tests: Sequence[Path] = ()) -> Iterator[SourceReport]:
    """Report on a recipe's pairs, source by source; lines without a usable pair are counted, not refused.

    Args:
        recipe: its data, and the model, template and limits by which tokens are counted.
        tests: tests whose texts must not be trained on, as in `curate.check.check`; the recipe's local ones are added.
    """
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"skip_bad": True})})
    names = [*chain(*recipe.compare.collections.values())] if recipe.compare else []
    names += [name for stage in (recipe.reconstruct, recipe.contrast) if stage for name in stage.evaluate_on]
    paths = {name: Path(name).expanduser() for name in names}
    if not_local := [name for name, path in paths.items() if not path.exists()]:
        _log.info(f"these tests are no local files, so pairs are not compared with them: {', '.join(not_local)}")
    local = dict.fromkeys([*tests, *(path for path in paths.values() if path.exists())])
    name = recipe.model.name
    tokenizer = load_tokenizer(name)
    settings = find_metadata(name) or find_embedder_settings(name)
    config, lengths = load_config(name), Lengths(recipe.data.query_tokens, recipe.data.document_tokens)
    check_lengths(name, config, lengths)
    model = describe(name, settings, config, tokenizer, own_template(recipe))
    store = open_pairs(recipe)
    with counting_bar("checking", len(store)) as advance:
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
    """Mine hard negatives, and write the pairs with them as JSONL, to train on.

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
    check_writable(Path(out), pairs, corpus)
    check_outside(Path(out), [pairs])
    if suffix_of(Path(out)) != ".jsonl":
        raise InputError(f"{out}: pairs are written as JSONL, and a file's name says how it is read. Name it .jsonl.")
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
                "for them. A model finds some: --by MODEL"
            )
    else:
        embedder = Embedder.load(by)
        with counting_bar("embedding", len(pool.texts)) as advance:
            scorer = mining.by_embedder(partial(embedder.encode, progress=advance), pool.texts)
    mined = Mined()
    with counting_bar("mining", len(store)) as advance:
        write_jsonl(Path(out), _rows(mining.mine(read(), pool, scorer, rules or Rules(), mined, reranker), advance))
    if mined.lost_scores:
        _log.warning(
            f"{mined.lost_scores} pairs got negatives that their scores do not cover, and are written without scores. "
            "A cross-encoder scores all texts of a pair: --rerank MODEL"
        )
    return mined


def _rows(pairs: Iterator[TextPair], progress: Callable[[int], None]) -> Iterator[dict[str, object]]:
    """Mined pairs as rows of JSONL."""
    for pair in pairs:
        row: dict[str, object] = {"query": pair.query, "positive": pair.positive, "negative": list(pair.negatives)}
        yield row | ({"scores": list(pair.scores)} if pair.scores else {})
        progress(1)
