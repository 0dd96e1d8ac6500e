"""Report on a data set: counts, token lengths, duplicates, dropped lines, and texts that are also in tests.

Pairs are read from the store that training reads. Only 64-bit hashes and lengths of texts are kept in memory.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorembed.data.beir import read_collection, splits
from anchorembed.data.evaluation_files import Candidates, SentencePair, find_test_sets, read_test_set
from anchorembed.data.pairs import TextPair, folded
from anchorembed.data.store import PairStore, open_corpus, text_key
from anchorembed.model.template import Prompts
from anchorembed.model.tokens import PairTokenizer

_EXAMPLES = 3  # for each finding
_EXAMPLE_CHARACTERS = 80  # for each side of an example
_PERCENTILES = (50, 90, 99, 100)

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]

FINDINGS = {
    "repeated pair": "query and positive are together on an earlier line",
    "repeated query": "the query is on an earlier line, with another positive",
    "repeated positive": "the positive is on an earlier line, with another query",
    "query is positive": "both sides are the same text",
    "negative is positive": "a hard negative is the pair's own positive",
    "text of a test": "a query or positive is a text of a test",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The number of pairs with one of `FINDINGS`, and the first few of them."""

    count: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one side, template and instruction included: percentiles, limit, and the share of texts above it."""

    percentiles: dict[int, int]
    limit: int
    cut: float


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Counts and findings of one source; ``dropped`` counts the lines without a usable pair, by reason."""

    source: str
    pairs: int
    negatives: int
    dropped: dict[str, int]
    query: TokenCounts
    document: TokenCounts
    findings: dict[str, Finding]


def check(
    store: PairStore,
    tokenizer: PairTokenizer,
    prompts: Prompts,
    tests: Iterable[Path] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[SourceReport]:
    """Report on each source of a store, by the tokenizer and the prompts of the model to train.

    Texts that differ only in letter case and white space are equal. Against texts of ``tests`` (BEIR folders, test
    files, or folders of these), punctuation is ignored too, because titles are joined to texts in different ways.
    ``progress`` is called with the number of pairs done since the last call.

    Raises:
        InputError: if a test cannot be read.
    """
    texts = (text for path in tests for file in find_test_sets(path) for text in _test_texts(file))
    test_keys = np.unique(_keys(filter(str.strip, texts), _without_punctuation))
    for number in range(len(store.sources)):
        yield _check_source(store, number, tokenizer, prompts, test_keys, progress)


def _check_source(
    store: PairStore,
    number: int,
    tokenizer: PairTokenizer,
    prompts: Prompts,
    test_keys: Keys,
    progress: Callable[[int], None],
) -> SourceReport:
    source = store.sources[number]
    prompts = prompts.of_pairs(source.instruction, source.symmetric)
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], Keys, Keys, Mask, Mask]] = []
    negatives = 0
    for pairs in store.chunks(number):
        parts.append(
            (
                tokenizer.count([prompts.query + pair.query for pair in pairs]),
                tokenizer.count([prompts.document + pair.positive for pair in pairs]),
                _keys((pair.query for pair in pairs), folded),
                _keys((pair.positive for pair in pairs), folded),
                _in_tests(pairs, test_keys),
                np.array([folded(pair.positive) in map(folded, pair.negatives) for pair in pairs]),
            )
        )
        negatives += sum(len(pair.negatives) for pair in pairs)
        progress(len(pairs))
    columns = map(np.concatenate, zip(*parts, strict=True))
    query_tokens, document_tokens, queries, positives, in_tests, self_negative = columns
    masks = _masks(queries, positives) | {"negative is positive": self_negative, "text of a test": in_tests}
    start = int(store.bounds[number])
    return SourceReport(
        source=source.name,
        pairs=len(queries),
        negatives=negatives,
        dropped=store.dropped[number],
        query=_token_counts(query_tokens, tokenizer.lengths.query),
        document=_token_counts(document_tokens, tokenizer.lengths.document),
        findings={
            name: Finding(
                int(masks[name].sum()),
                [_example(store[start + row]) for row in np.flatnonzero(masks[name])[:_EXAMPLES].tolist()],
            )
            for name in FINDINGS
        },
    )


def _masks(queries: Keys, positives: Keys) -> dict[str, Mask]:
    """Masks of the pairs with each finding about repetitions, by the hashes of their texts."""
    pairs = queries * np.uint64(0x9E3779B97F4A7C15) + positives  # modulo 2**64; an odd factor loses no bits
    repeated = _seen_before(pairs)
    return {
        "repeated pair": repeated,
        "repeated query": _seen_before(queries) & ~repeated,
        "repeated positive": _seen_before(positives) & ~repeated,
        "query is positive": queries == positives,
    }


def _seen_before(keys: Keys) -> Mask:
    """Mask of the keys that repeat an earlier key."""
    repeated = np.ones(len(keys), np.bool_)
    repeated[np.unique(keys, return_index=True)[1]] = False
    return repeated


def _in_tests(pairs: Sequence[TextPair], test_keys: Keys) -> Mask:
    """Mask of the pairs whose query or positive is a text of a test."""
    sides = ([pair.query for pair in pairs], [pair.positive for pair in pairs])
    queries, positives = (np.isin(_keys(texts, _without_punctuation), test_keys) for texts in sides)
    return queries | positives


def _keys(texts: Iterable[str], normalize: Callable[[str], str]) -> Keys:
    """Hashes of normalized texts."""
    return np.fromiter((text_key(normalize(text)) for text in texts), np.uint64)


def _without_punctuation(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _example(pair: TextPair) -> str:
    query, positive = (" ".join(text.split())[:_EXAMPLE_CHARACTERS] for text in (pair.query, pair.positive))
    return f"{pair.source}:{pair.line}: {query!r} -> {positive!r}"


def _token_counts(tokens: NDArray[np.int32], limit: int) -> TokenCounts:
    values = np.percentile(tokens, _PERCENTILES, method="higher").tolist()
    percentiles = {percentile: int(value) for percentile, value in zip(_PERCENTILES, values, strict=True)}
    return TokenCounts(percentiles, limit, float(np.mean(tokens > limit)))


def _test_texts(path: Path) -> Iterator[str]:
    """Texts of a BEIR folder or a test file."""
    if path.is_dir():
        names = splits(path)
        split = "test" if "test" in names or not names else names[0]
        collection = read_collection(path, split, open_corpus)
        for document in chain(collection.documents, collection.queries):
            yield document.text
            yield document.text.partition("\n")[2]  # without its title
        return
    for row in read_test_set(path).rows:
        if isinstance(row, Candidates):
            yield from (row.query, *row.positives, *row.negatives)
        elif isinstance(row, SentencePair):
            yield from (row.first, row.second)
        else:
            yield row.text


def report(source: SourceReport) -> str:
    """A source's report as text."""
    lines = [f"{source.source}: {source.pairs:,} pairs, {source.negatives:,} hard negatives"]
    for side, lengths in (("query", source.query), ("document", source.document)):
        shown = ", ".join(f"p{name} {value}" for name, value in lengths.percentiles.items())
        lines.append(f"  {side} tokens: {shown}; {lengths.cut:.1%} are cut at {lengths.limit}")
    lines += [f"  dropped {count:,}: {reason}" for reason, count in source.dropped.items()]
    for name, finding in source.findings.items():
        if finding.count:
            lines.append(f"  {name} {finding.count:,} ({finding.count / source.pairs:.1%}): {FINDINGS[name]}")
            lines += [f"    {example}" for example in finding.examples]
    return "\n".join(lines)
