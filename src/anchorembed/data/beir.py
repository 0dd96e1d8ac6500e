"""BEIR folders: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``, as retrieval tests and as pairs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorembed.data.documents import Document, Documents, read_corpus
from anchorembed.data.formats import existing, lines, listed
from anchorembed.data.rows import BadRow, Rows
from anchorembed.errors import InputError
from anchorembed.system.files import write_file, write_jsonl

_QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True, slots=True)
class Collection:
    """A retrieval test: documents, queries, and the graded relevance ``qrels[query id][document id]``."""

    name: str
    documents: Documents
    queries: tuple[Document, ...]
    qrels: dict[str, dict[str, int]]


def read_collection(
    folder: Path,
    split: str = "test",
    read_documents: Callable[[Path], Documents] = lambda corpus: tuple(read_corpus(corpus)),
) -> Collection:
    """Read a BEIR folder; queries without a judgement above 0 are left out.

    Args:
        folder: with ``corpus.jsonl``, ``queries.jsonl`` (each also .gz) and ``qrels/<split>.tsv``.
        split: which judgements to read.
        read_documents: reads the corpus file, by default into memory.

    Raises:
        InputError: if a file is missing or has a fault, or a judgement names an unknown id.
    """
    qrels_path = existing(folder) / "qrels" / f"{split}.tsv"
    if not qrels_path.is_file():
        raise InputError(f"{qrels_path}: no such file. {listed('Splits there', splits(folder))}")
    documents = read_documents(beir_file(folder, "corpus"))
    queries = tuple(read_corpus(beir_file(folder, "queries")))
    qrels = _qrels(qrels_path, {query.id for query in queries}, {document.id for document in documents})
    kept = {query: scores for query, scores in qrels.items() if max(scores.values()) > 0}
    if not kept:
        raise InputError(f"{qrels_path}: no judgement above 0. Give at least one relevant document.")
    return Collection(folder.resolve().name, documents, tuple(query for query in queries if query.id in kept), kept)


def write_collection(folder: Path, documents: Iterable[Document], queries: Iterable[tuple[Document, str]]) -> None:
    """Write a BEIR folder; each query comes with the id of its only relevant document.

    Raises InputError as `write_file` does.
    """
    judged = list(queries)
    write_jsonl(folder / "corpus.jsonl", ({"_id": document.id, "text": document.text} for document in documents))
    write_jsonl(folder / "queries.jsonl", ({"_id": query.id, "text": query.text} for query, _ in judged))
    rows = [_QRELS_HEADER, *([query.id, document, "1"] for query, document in judged)]
    write_file(folder / "qrels" / "test.tsv", "".join("\t".join(row) + "\n" for row in rows))


def judged_pair_rows(folder: Path, qrels: Path) -> Rows:
    """Pair each query with each document judged above 0; only the texts of pairs are held in memory."""
    judged = [(line, query, document) for line, query, document, score in judgements(qrels) if score > 0]
    queries = _texts(beir_file(folder, "queries"), {query for _, query, _ in judged})
    documents = _texts(beir_file(folder, "corpus"), {document for _, _, document in judged})
    for line, query, document in judged:
        if query not in queries or document not in documents:
            yield line, _unknown(query, document, queries)
        else:
            yield line, {"query": queries[query], "positive": documents[document]}


def _texts(path: Path, ids: set[str]) -> dict[str, str]:
    return {document.id: document.text for document in read_corpus(path) if document.id in ids}


def _unknown(query: str, document: str, queries: Iterable[str]) -> BadRow:
    if query not in queries:
        return BadRow(f"query {query!r} is not in queries.jsonl")
    return BadRow(f"document {document!r} is not in corpus.jsonl")


def _qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line, query, document, score in judgements(path):
        if query not in queries or document not in documents:
            raise InputError(f"{path}:{line}: {_unknown(query, document, queries).fault}. Add it, or remove the line.")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise InputError(f"{path}:{line}: query {query!r} and document {document!r} have two scores. Keep one.")
    return qrels


def judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Stream ``(line, query id, document id, score)`` below a header; scores may be graded or negative."""
    for line, text in lines(path):
        fields = text.rstrip("\r\n").split("\t")
        if line == 1:
            if fields != _QRELS_HEADER:
                raise InputError(f"{path}:{line}: the header is {fields}. Write {_QRELS_HEADER}, separated by tabs.")
        elif text.strip():
            yield line, *_judgement(f"{path}:{line}", fields)


def _judgement(location: str, fields: list[str]) -> tuple[str, str, int]:
    if len(fields) != len(_QRELS_HEADER):
        raise InputError(
            f"{location}: {len(fields)} fields, not 3. Write query id, document id and score, separated by tabs."
        )
    try:
        return fields[0], fields[1], int(fields[2])
    except ValueError:
        raise InputError(f"{location}: the score {fields[2]!r} is not an integer. Write 0, 1, 2, ...") from None


def beir_file(folder: Path, name: str) -> Path:
    """Path of ``<name>.jsonl`` or ``<name>.jsonl.gz`` in a folder; InputError if it has neither."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name}.jsonl or {name}.jsonl.gz. A BEIR folder needs one of them.")


def splits(folder: Path) -> list[str]:
    """Names of the splits that a folder has judgements for."""
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def beir_folders_in(folder: Path) -> str:
    """A sentence that names the BEIR folders in a folder; empty if there are none."""
    inner = [str(qrels.parent) for qrels in sorted(folder.glob("*/qrels"))]
    return f"It holds BEIR folders. {listed('Name one or more of', inner)}" if inner else ""
