"""The index against brute force, its reuse and replacement, and what it leaves behind when a build fails."""

import errno
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from anchorembed.data.documents import Document
from anchorembed.errors import InputError
from anchorembed.model.truncate_and_quantize import VectorFormat, cut, int8_ranges, quantize, restore, vector_format
from anchorembed.model.vectors import Floats, Side, cosines, unit_rows
from anchorembed.search import index as indexing
from anchorembed.search.index import Hit, Index, open_or_build
from anchorembed.search.manifest import MANIFEST, Manifest
from anchorembed.system.files import write_jsonl


class BagOfWords:
    """Stands for an Embedder: the sum of one random vector per word, drawn from the word's hash."""

    dimension = 32

    def __init__(self, fingerprint: str = "bag", scale: float = 1.0, window: int = 256) -> None:
        self.fingerprint, self.scale, self.window = fingerprint, scale, window
        self.sides: list[Side] = []

    def word(self, word: str) -> Floats:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8])
        return np.random.default_rng(seed).standard_normal(self.dimension).astype(np.float32)

    def encode(self, texts: Iterable[str], side: Side = "document") -> Floats:
        texts = list(texts)
        self.sides.append(side)
        return np.stack([self.scale * sum(map(self.word, text.split()), np.zeros(32, np.float32)) for text in texts])

    def stream(
        self, texts: Iterable[str], side: Side, instruction: None, *, progress: Callable[[int], None] | None
    ) -> Iterator[Floats]:
        remaining = iter(texts)
        while window := list(islice(remaining, self.window)):
            yield self.encode(window, side)
            if progress:
                progress(len(window))


class Interrupted(BaseException):
    """Stands for Ctrl-C: no ordinary ``except Exception`` stops it."""


def texts(count: int, seed: int = 0) -> list[Document]:
    words = [f"word{number}" for number in range(60)]
    rng = np.random.default_rng(seed)
    return [Document(f"d{number}", " ".join(rng.choice(words, 6))) for number in range(count)]


def brute_force(encoder: BagOfWords, documents: list[Document], query: str, top_k: int) -> list[Hit]:
    query_H = encoder.encode([query])[0].astype(np.float64)
    vectors = encoder.encode([document.text for document in documents]).astype(np.float64)
    scores = vectors @ query_H / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query_H)
    order = sorted(range(len(documents)), key=lambda row: (-round(scores[row], 5), documents[row].id))[:top_k]
    return [Hit(rank, documents[row].id, scores[row], documents[row].text) for rank, row in enumerate(order, 1)]


def corpus_file(path: Path, documents: list[Document]) -> Path:
    write_jsonl(path, [{"_id": document.id, "text": document.text} for document in documents])
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("window", [1, 7, 256])
def test_search_agrees_with_brute_force(tmp_path: Path, window: int) -> None:
    encoder, documents = BagOfWords(window=window), texts(40 if window == 1 else 300)
    index = Index.build(encoder, documents, tmp_path / "index")
    assert len(index) == len(documents)
    for query in ("word1 word2", "word3", "unseen words"):
        hits, expected = index.search(encoder, query, 12), brute_force(encoder, documents, query, 12)
        assert [(hit.rank, hit.id, hit.text) for hit in hits] == [(hit.rank, hit.id, hit.text) for hit in expected]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_many_writes_hold_the_same_documents_as_one(tmp_path: Path) -> None:
    encoder, documents = BagOfWords(), texts(100)
    once = Index.build(encoder, documents, tmp_path / "once")
    often = Index.build(BagOfWords(window=16), documents, tmp_path / "often")
    assert often.search(encoder, "word1", 100) == once.search(encoder, "word1", 100)
    assert {hit.id for hit in often.search(encoder, "word1", 100)} == {document.id for document in documents}


def test_scores_are_cosines_whatever_the_length_of_the_vectors(tmp_path: Path) -> None:
    documents = [Document("same", "red fox"), Document("none", ""), Document("other", "blue sea")]
    hits = Index.build(BagOfWords(), documents, tmp_path / "a").search(BagOfWords(), "red fox")
    long = Index.build(BagOfWords(scale=100), documents, tmp_path / "b").search(BagOfWords(scale=7), "red fox")
    assert hits[0].id == "same"
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert next(hit.score for hit in hits if hit.id == "none") == 0
    assert [hit.id for hit in long] == [hit.id for hit in hits]
    assert [hit.score for hit in long] == pytest.approx([hit.score for hit in hits], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_scores_go_by_id_even_at_the_cut(tmp_path: Path, seed: int) -> None:
    documents = [Document(f"d{number:03}", "the same text") for number in range(200)]
    documents += [Document(f"x{number:03}", "another text") for number in range(40)]
    shuffled = [documents[place] for place in np.random.default_rng(seed).permutation(len(documents))]
    hits = Index.build(BagOfWords(), shuffled, tmp_path / "index").search(BagOfWords(), "the same text", 5)
    assert [hit.id for hit in hits] == ["d000", "d001", "d002", "d003", "d004"]
    assert len({hit.score for hit in hits}) == 1


def test_rounding_in_the_store_cannot_misplace_the_cut(tmp_path: Path) -> None:
    class Near(BagOfWords):
        def encode(self, texts: Iterable[str], side: Side = "document") -> Floats:
            return self.word("common") + 1e-6 * np.stack([self.word(text) for text in texts])

    documents = [Document(f"d{number}", f"word{number}") for number in range(600)]
    index = Index.build(Near(), documents, tmp_path / "index")
    vectors_DH = unit_rows(Near().encode([document.text for document in documents]))
    scores = cosines(unit_rows(Near().encode(["query"]))[0], vectors_DH).tolist()
    order = sorted(range(600), key=lambda row: (-scores[row], documents[row].id))
    for top_k in (1, 10, 100):
        hits = index.search(Near(), "query", top_k)
        assert [(hit.id, hit.score) for hit in hits] == [(documents[row].id, scores[row]) for row in order[:top_k]]


def test_fewer_documents_than_asked_for_gives_them_all(tmp_path: Path) -> None:
    index = Index.build(BagOfWords(), texts(3), tmp_path / "index")
    assert [hit.rank for hit in index.search(BagOfWords(), "word1", 50)] == [1, 2, 3]


def test_ids_and_texts_come_back_as_they_were(tmp_path: Path) -> None:
    awkward = [
        "it's",
        'say "x"',
        "a;DROP TABLE documents--",
        "é\u0301",
        "文書",
        "\U0001f98a",
        " spaced ",
        "new\nline",
        "%_\\",
    ]
    documents = [Document(name, f"text of {name}") for name in awkward]
    index = Index.build(BagOfWords(), documents, tmp_path / "it's an index")
    found = {hit.id: hit.text for hit in index.search(BagOfWords(), "text", 50)}
    assert found == {document.id: document.text for document in documents}


def test_texts_are_embedded_as_documents_and_queries_as_queries(tmp_path: Path) -> None:
    encoder = BagOfWords(window=2)
    Index.build(encoder, texts(5), tmp_path / "index").search(encoder, "word1")
    assert encoder.sides == ["document"] * 3 + ["query"]


def test_progress_counts_documents(tmp_path: Path) -> None:
    seen: list[int] = []
    Index.build(BagOfWords(window=2), iter(texts(5)), tmp_path / "index", seen.append)
    assert seen == [2, 2, 1]


def test_manifest_names_model_and_corpus(tmp_path: Path) -> None:
    corpus = corpus_file(tmp_path / "corpus.jsonl", texts(4))
    open_or_build(BagOfWords(), corpus, tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest.pop("table") == stored_table(tmp_path / "index").stem
    assert manifest == {
        "format": "anchorembed-index-1",
        "model": "bag",
        "dimension": 32,
        "documents": 4,
        "corpus": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        "precision": "float32",
        "ranges": [],
    }


def test_same_corpus_and_model_are_reused_without_embedding(tmp_path: Path) -> None:
    corpus, encoder = corpus_file(tmp_path / "corpus.jsonl", texts(20)), BagOfWords()
    first, reused = open_or_build(encoder, corpus, tmp_path / "index")
    assert not reused
    encoder.sides.clear()
    second, reused = open_or_build(encoder, corpus_file(tmp_path / "copy.jsonl", texts(20)), tmp_path / "index")
    assert reused
    assert encoder.sides == []
    assert second.search(encoder, "word1") == first.search(encoder, "word1")


def test_who_comes_while_an_index_is_made_waits_and_reuses_it(tmp_path: Path) -> None:
    corpus, reused = corpus_file(tmp_path / "corpus.jsonl", texts(20)), []

    class Joined(BagOfWords):
        def encode(self, texts: Iterable[str], side: Side = "document") -> Floats:
            if not self.sides:
                other.start()
                other.join(0.3)
            return super().encode(texts, side)

    def call() -> None:
        reused.append(open_or_build(encoder, corpus, tmp_path / "index")[1])

    encoder, other = Joined(), threading.Thread(target=call)
    call()
    other.join()
    assert reused == [False, True]
    assert encoder.sides == ["document"]


@pytest.mark.parametrize("change", ["corpus", "model"])
def test_another_corpus_or_model_replaces_the_index(tmp_path: Path, change: str) -> None:
    corpus = corpus_file(tmp_path / "corpus.jsonl", texts(20))
    open_or_build(BagOfWords(), corpus, tmp_path / "index")
    encoder = BagOfWords("other" if change == "model" else "bag")
    if change == "corpus":
        corpus_file(corpus, texts(21, seed=1))
    index, reused = open_or_build(encoder, corpus, tmp_path / "index")
    assert not reused
    assert len(index) == (21 if change == "corpus" else 20)
    assert index.manifest.model == encoder.fingerprint
    assert open_or_build(encoder, corpus, tmp_path / "index")[1]
    assert names(tmp_path) - {"cache"} == {"corpus.jsonl", "index"}, "the cache has the lock file, if filelock keeps it"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [ValueError, Interrupted])
def test_an_interrupted_build_leaves_nothing_and_keeps_the_old_index(
    tmp_path: Path, failure: type[BaseException], existing: bool
) -> None:
    if existing:
        Index.build(BagOfWords(), texts(3), tmp_path / "index")
    before = names(tmp_path)

    def stream() -> Iterator[Document]:
        yield from texts(30)
        raise failure("stopped")

    with pytest.raises(failure):
        Index.build(BagOfWords("new", window=4), stream(), tmp_path / "index")
    assert names(tmp_path) == before
    if existing:
        assert len(Index.open(tmp_path / "index").search(BagOfWords(), "word1")) == 3


def test_a_failed_replacement_puts_the_old_index_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.build(BagOfWords(), texts(3), tmp_path / "index")
    rename = Path.rename

    def fails_for_new(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(InputError, match="no space"):
        Index.build(BagOfWords("new"), texts(9), tmp_path / "index")
    assert names(tmp_path) == {"index"}
    assert Index.open(tmp_path / "index").manifest.model == "bag"


def test_more_hits_than_any_store_can_give_are_all_there_are(tmp_path: Path) -> None:
    index = Index.build(BagOfWords(), texts(5), tmp_path / "index")
    assert len(index.search(BagOfWords(), "word1", 3_000_000_000)) == 5
    assert len(index.search(BagOfWords(), "word1", 2**70)) == 5


def stored_table(folder: Path) -> Path:
    """The table of an index that was built once."""
    (table,) = folder.glob("documents-*.lance")
    return table


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_who_has_an_index_open_reads_on_when_it_is_replaced(tmp_path: Path, precision: str) -> None:
    encoder, folder = BagOfWords(), tmp_path / "index"
    form = vector_format(encoder.dimension, encoder.dimension, precision)
    index = Index.build(encoder, texts(500), folder, form=form)
    hits = index.search(encoder, "word1", 20)
    newer = Index.build(BagOfWords("new"), texts(400, seed=1), folder)
    assert index.search(encoder, "word1", 20) == hits
    assert len(newer) == len(Index.open(folder)) == 400
    Index.build(encoder, texts(300, seed=2), folder)
    assert len(list(folder.glob("documents-*.lance"))) == 2


@pytest.mark.parametrize("change", ["replaced twice", "removed"])
def test_an_index_that_is_gone_while_it_is_read_is_one_message(tmp_path: Path, change: str) -> None:
    encoder, folder = BagOfWords(), tmp_path / "index"
    index = Index.build(encoder, texts(500), folder)
    if change == "removed":
        shutil.rmtree(folder)
    else:
        for seed in (1, 2):
            Index.build(encoder, texts(400, seed=seed), folder)
    with pytest.raises(InputError, match="index was replaced or removed after it was opened") as caught:
        index.search(encoder, "word1")
    assert "\n" not in str(caught.value)


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, folder = BagOfWords(), tmp_path / "index"
    Index.build(encoder, texts(30), folder)
    read, done = indexing.read_manifest, []

    def replaced_after(folder: Path) -> Manifest | None:
        manifest = read(folder)
        if not done:
            done.append(folder)
            Index.build(encoder, texts(40, seed=1), folder)
        return manifest

    monkeypatch.setattr(indexing, "read_manifest", replaced_after)
    assert len(Index.open(folder)) == 40


def test_a_table_that_is_lost_after_opening_is_damage(tmp_path: Path) -> None:
    encoder, folder = BagOfWords(), tmp_path / "index"
    index = Index.build(encoder, texts(500), folder)
    shutil.rmtree(stored_table(folder) / "data")
    with pytest.raises(InputError, match="the index is damaged"):
        index.search(encoder, "word1")


def test_a_full_disk_is_named_with_the_index(tmp_path: Path) -> None:
    """Stood in for by a limit on the size of files, which the store meets as it writes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"index: cannot be written \(.*File too large"):
            Index.build(BagOfWords(), texts(1000), tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {MANIFEST: '{"name": "my web app"}'}, {MANIFEST: "[]"}])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, content: dict[str, str]) -> None:
    corpus, folder = corpus_file(tmp_path / "corpus.jsonl", texts(3)), tmp_path / "mine"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="left alone"):
        open_or_build(BagOfWords(), corpus, folder)
    with pytest.raises(InputError, match="left alone"):
        Index.build(BagOfWords(), texts(3), folder)
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == content


def test_an_empty_folder_may_become_an_index(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    assert len(Index.build(BagOfWords(), texts(3), tmp_path / "index")) == 3


@pytest.mark.parametrize("damage", ["{", '{"format": "anchorembed-index-1"}', "\x00"])
def test_a_damaged_manifest_is_named_with_the_cure(tmp_path: Path, damage: str) -> None:
    corpus, folder = corpus_file(tmp_path / "corpus.jsonl", texts(3)), tmp_path / "index"
    open_or_build(BagOfWords(), corpus, folder)
    (folder / MANIFEST).write_text(damage, encoding="utf-8")
    for attempt in (lambda: open_or_build(BagOfWords(), corpus, folder), lambda: Index.open(folder)):
        with pytest.raises(InputError, match=r"manifest\.json: damaged.* Delete the folder"):
            attempt()


def test_a_lost_table_is_named_with_the_cure(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    Index.build(BagOfWords(), texts(3), folder)
    stored_table(folder).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"damaged.* Delete the folder"):
        Index.open(folder)


def test_a_manifest_that_miscounts_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    Index.build(BagOfWords(), texts(3), folder)
    manifest = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.replace('"documents": 3', '"documents": 4'), encoding="utf-8")
    with pytest.raises(InputError, match="3 documents stored, 4 in"):
        Index.open(folder)


def test_faults_of_the_caller_are_named(tmp_path: Path) -> None:
    index = Index.build(BagOfWords(), texts(3), tmp_path / "index")
    with pytest.raises(InputError, match="top_k: 0 is below 1"):
        index.search(BagOfWords(), "word1", 0)
    with pytest.raises(InputError, match="made with model bag, not other"):
        index.search(BagOfWords("other"), "word1")
    corpus = corpus_file(tmp_path / "corpus.jsonl", [])
    with pytest.raises(InputError, match=r"no document\. Give at least one line"):
        open_or_build(BagOfWords(), corpus, tmp_path / "empty")
    corpus_file(corpus, [*texts(3), Document("d0", "again")])
    with pytest.raises(InputError, match="the id 'd0' is already taken by an earlier line"):
        open_or_build(BagOfWords(window=2), corpus, tmp_path / "empty")
    with pytest.raises(InputError, match="no index here"):
        Index.open(tmp_path / "empty")
    with pytest.raises(InputError, match="no such corpus file"):
        open_or_build(BagOfWords(), tmp_path / "missing.jsonl", tmp_path / "empty")
    assert names(tmp_path) - {"cache"} == {"index", "corpus.jsonl"}


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("dimensions", [32, 16])
def test_smaller_vectors_are_found_as_brute_force_finds_them(tmp_path: Path, dimensions: int, precision: str) -> None:
    encoder, documents = BagOfWords(window=50), texts(300)
    corpus = corpus_file(tmp_path / "corpus.jsonl", documents)
    form = vector_format(32, dimensions, precision)
    index, _ = open_or_build(encoder, corpus, tmp_path / "index", form=form)
    vectors = cut(unit_rows(encoder.encode([document.text for document in documents])), dimensions)
    form = replace(form, ranges=int8_ranges(vectors) if precision == "int8" else None)
    assert index.form == Index.open(tmp_path / "index").form == form
    restored = restore(quantize(vectors, form), form)
    for query in ("word1 word2", "word3"):
        scores = cosines(cut(unit_rows(encoder.encode([query])), dimensions)[0], restored).tolist()
        order = sorted(range(300), key=lambda row: (-scores[row], documents[row].id))
        for top_k in (1, 12, 400):
            found = [(hit.id, hit.score) for hit in index.search(encoder, query, top_k)]
            assert found == [(documents[row].id, scores[row]) for row in order[:top_k]]


def test_equal_bits_go_by_id(tmp_path: Path) -> None:
    documents = [Document(f"d{number:03}", "the same text") for number in range(200)]
    shuffled = [documents[place] for place in np.random.default_rng(0).permutation(len(documents))]
    index = Index.build(BagOfWords(window=16), shuffled, tmp_path / "index", form=VectorFormat(16, "binary"))
    assert [hit.id for hit in index.search(BagOfWords(), "same", 3)] == ["d000", "d001", "d002"]


def test_another_format_replaces_the_index(tmp_path: Path) -> None:
    corpus, folder = corpus_file(tmp_path / "corpus.jsonl", texts(20)), tmp_path / "index"
    forms = [VectorFormat(32), VectorFormat(16), VectorFormat(16, "int8"), VectorFormat(16, "binary")]
    for form in forms:
        assert not open_or_build(BagOfWords(), corpus, folder, form=form)[1]
        assert open_or_build(BagOfWords(), corpus, folder, form=form)[1]
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for damage in ({"precision": "int8"}, {"precision": "int4"}, {"dimension": 9}, {"table": "../a"}):
        (folder / MANIFEST).write_text(json.dumps(content | damage), encoding="utf-8")
        with pytest.raises(InputError, match=r"manifest\.json: damaged.* Delete the folder"):
            open_or_build(BagOfWords(), corpus, folder)
    Index.build(BagOfWords(), texts(20), tmp_path / "whole")
    content = json.loads((tmp_path / "whole" / MANIFEST).read_text(encoding="utf-8"))
    del content["precision"], content["ranges"]
    (tmp_path / "whole" / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    assert len(Index.open(tmp_path / "whole").search(BagOfWords(), "word1")) == 10
