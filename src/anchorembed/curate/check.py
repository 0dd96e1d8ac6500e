"""What is in a data set, before training finds out: counts, lengths, duplicates, one-sided lines, test texts in it.

Pairs are read through the store that training reads, so what is counted here is what training uses. In memory are
64-bit hashes and lengths, never the texts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorembed.data.beir import read_collection
from anchorembed.data.documents import Document, read_corpus
from anchorembed.data.judged import Candidates, SentencePair, read_test_set, test_files
from anchorembed.data.pairs import TextPair
from anchorembed.data.store import PairStore, text_key
from anchorembed.model.template import instruct
from anchorembed.model.tokens import PairTokenizer

_EXAMPLES = 3
_SHOWN = 80  # characters of an example
_PERCENTILES = (50, 90, 99, 100)

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]

FINDINGS = {
    "repeated pair": "query and positive stand together on an earlier line",
    "repeated query": "the query stands on an earlier line, with another positive",
    "repeated positive": "the positive stands on an earlier line, with another query",
    "query is positive": "both sides are the same text",
    "negative is positive": "a hard negative is the pair's own positive",
    "text of a test": "a query or positive is a text of a test",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """How many pairs something is true of, and the first few of them."""

    count: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one side, template and instruction included: percentiles, and the share of texts that are cut."""

    percentiles: dict[int, int]
    limit: int
    cut: float


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What is in one source; ``dropped`` are lines without a usable pair, by reason."""

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
    tests: Iterable[Path] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[SourceReport]:
    """Go through every source of a store.

    Texts count as the same whatever their case and spaces; those of tests, whatever their punctuation, too, since a
    title is joined to its text in many ways.

    Args:
        store: the pairs.
        tokenizer: of the model they would train, with its length limits.
        tests: BEIR folders, test files, or folders of them, whose texts should not be trained on.
        advance: called with the number of pairs done.

    Raises:
        InputError: if a test cannot be read.
    """
    forbidden = np.unique(_keys(_all_texts(tests), _words))
    for number in range(len(store.sources)):
        yield _check_source(store, number, tokenizer, forbidden, advance)


def _check_source(
    store: PairStore, number: int, tokenizer: PairTokenizer, forbidden: Keys, advance: Callable[[int], None]
) -> SourceReport:
    prefix = instruct(store.sources[number].instruction)
    of_documents = prefix if store.sources[number].symmetric else ""
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], Keys, Keys, Mask, Mask]] = []
    negatives = 0
    for pairs in store.chunks(number):
        parts.append(
            (
                tokenizer.count([prefix + pair.query for pair in pairs]),
                tokenizer.count([of_documents + pair.positive for pair in pairs]),
                _keys((pair.query for pair in pairs), _plain),
                _keys((pair.positive for pair in pairs), _plain),
                _tested(pairs, forbidden),
                np.array([_plain(pair.positive) in map(_plain, pair.negatives) for pair in pairs]),
            )
        )
        negatives += sum(len(pair.negatives) for pair in pairs)
        advance(len(pairs))
    columns = map(np.concatenate, zip(*parts, strict=True))
    query_tokens, document_tokens, queries, positives, tested, self_negative = columns
    masks = _masks(queries, positives) | {"negative is positive": self_negative, "text of a test": tested}
    first = int(store.bounds[number])
    return SourceReport(
        source=store.sources[number].name,
        pairs=len(queries),
        negatives=negatives,
        dropped=store.dropped[number],
        query=_token_counts(query_tokens, tokenizer.lengths.query),
        document=_token_counts(document_tokens, tokenizer.lengths.document),
        findings={
            name: Finding(
                int(masks[name].sum()),
                [_example(store[first + row]) for row in np.flatnonzero(masks[name])[:_EXAMPLES].tolist()],
            )
            for name in FINDINGS
        },
    )


def _masks(queries: Keys, positives: Keys) -> dict[str, Mask]:
    """What is true of which pairs, by their texts' hashes."""
    pairs = queries * np.uint64(0x9E3779B97F4A7C15) + positives  # wraps; odd, so it loses nothing of either
    again = _seen_before(pairs)
    return {
        "repeated pair": again,
        "repeated query": _seen_before(queries) & ~again,
        "repeated positive": _seen_before(positives) & ~again,
        "query is positive": queries == positives,
    }


def _seen_before(keys: Keys) -> Mask:
    """Which keys stand earlier, too."""
    again = np.ones(len(keys), np.bool_)
    again[np.unique(keys, return_index=True)[1]] = False
    return again


def _tested(pairs: Sequence[TextPair], forbidden: Keys) -> Mask:
    """Which pairs have a text of a test."""
    sides = ([pair.query for pair in pairs], [pair.positive for pair in pairs])
    queries, positives = (np.isin(_keys(texts, _words), forbidden) for texts in sides)
    return queries | positives


def _keys(texts: Iterable[str], same: Callable[[str], str]) -> Keys:
    """Hashes of texts as ``same`` makes those alike that count as the same."""
    return np.fromiter((text_key(same(text)) for text in texts), np.uint64)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _example(pair: TextPair) -> str:
    query, positive = (" ".join(text.split())[:_SHOWN] for text in (pair.query, pair.positive))
    return f"{pair.source}:{pair.line}: {query!r} -> {positive!r}"


def _token_counts(tokens: NDArray[np.int32], limit: int) -> TokenCounts:
    found = np.percentile(tokens, _PERCENTILES, method="higher").tolist()
    percentiles = {name: int(value) for name, value in zip(_PERCENTILES, found, strict=True)}
    return TokenCounts(percentiles, limit, float(np.mean(tokens > limit)))


def _all_texts(tests: Iterable[Path]) -> Iterator[str]:
    """Texts of all tests, none of them empty."""
    texts = (text for place in tests for file in test_files(place) for text in _test_texts(file))
    return filter(str.strip, texts)


@dataclass(frozen=True, slots=True)
class _Corpus:
    """The documents of a corpus file, read anew each time they are gone through."""

    path: Path

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Document]:
        return read_corpus(self.path)


def _test_texts(place: Path) -> Iterator[str]:
    """Texts of a BEIR folder or a test file."""
    if place.is_dir():
        splits = sorted(
            (path.stem for path in (place / "qrels").glob("*.tsv")), key=lambda name: (name != "test", name)
        )
        collection = read_collection(place, next(iter(splits), "test"), _Corpus)
        for document in chain(collection.documents, collection.queries):
            yield document.text
            yield document.text.partition("\n")[2]  # without its title
        return
    for row in read_test_set(place).rows:
        if isinstance(row, Candidates):
            yield from (row.query, *row.positives, *row.negatives)
        elif isinstance(row, SentencePair):
            yield from (row.first, row.second)
        else:
            yield row.text


def report(found: SourceReport) -> str:
    """A source's report as text."""
    lines = [f"{found.source}: {found.pairs:,} pairs, {found.negatives:,} hard negatives"]
    for side, lengths in (("query", found.query), ("document", found.document)):
        shown = ", ".join(f"p{name} {value}" for name, value in lengths.percentiles.items())
        lines.append(f"  {side} tokens: {shown}; {lengths.cut:.1%} are cut at {lengths.limit}")
    lines += [f"  dropped {count:,}: {reason}" for reason, count in found.dropped.items()]
    for name, finding in found.findings.items():
        if finding.count:
            lines.append(f"  {name} {finding.count:,} ({finding.count / found.pairs:.1%}): {FINDINGS[name]}")
            lines += [f"    {example}" for example in finding.examples]
    return "\n".join(lines)
