"""Files of pairs, texts and judgements on disk, and what reading them gives."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.errors import InputError

CURE = "Remove the line, or drop and count such lines by data.skip_bad or --skip-bad."


def texts(pairs: Iterable[TextPair]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(pair.query, pair.positive, pair.negatives) for pair in pairs]


def lines(path: Path, *rows: str | Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def fault(path: str | Path) -> str:
    """Return the message of the InputError that reading the pairs ends with."""
    with pytest.raises(InputError) as caught:
        list(read_pairs(path))
    return str(caught.value)


def beir(folder: Path, judgements: str, *, split: str = "test", header: str = "query-id\tcorpus-id\tscore\n") -> Path:
    lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "T", "text": "one"},
        {"_id": "d2", "text": "two"},
        {"_id": "d3", "title": "", "text": ""},
    )
    lines(
        folder / "queries.jsonl",
        {"_id": "q1", "text": "first"},
        {"_id": 2, "text": "second"},
        {"_id": "q3", "text": "third"},
    )
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{split}.tsv").write_text(header + judgements, encoding="utf-8")
    return folder
