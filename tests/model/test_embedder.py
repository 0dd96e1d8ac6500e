"""A text's embedding is the state at its EOS and depends on nothing but the text."""

import random
import shutil
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import METADATA, read_metadata
from anchorembed.model.packing import PackedBatch, pack
from anchorembed.model.template import Prompts, Template, instruct
from anchorembed.model.tokens import Lengths
from anchorembed.model.vectors import Side
from tiny import WORDS


def texts(count: int = 60) -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count)]


def test_embedding_does_not_depend_on_its_batch(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    together = embedder.encode(texts())
    alone = np.concatenate([embedder.encode([text]) for text in texts()])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    monkeypatch.setattr("anchorembed.model.embedder._TOKENS", 64)
    monkeypatch.setattr("anchorembed.model.embedder._WINDOW", 7)
    np.testing.assert_allclose(embedder.encode(iter(texts())), together, atol=1e-5)
    backwards = embedder.encode(texts()[::-1])[::-1]
    np.testing.assert_allclose(backwards, together, atol=1e-5)


@pytest.mark.parametrize("longest", [60, 5])
def test_where_memory_ends_fewer_texts_are_computed_at_once(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    whole, states = embedder.encode(texts()), embedder.backbone.states

    def little_memory(embeddings: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        if len(batch.tokens) > longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(embeddings, batch)

    monkeypatch.setattr(embedder.backbone, "states", little_memory)
    if longest == 5:  # which not even one text is
        with pytest.raises(torch.OutOfMemoryError):
            embedder.encode(texts())
        return
    done: list[int] = []
    np.testing.assert_allclose(embedder.encode(texts(), progress=done.append), whole, atol=1e-5)
    assert sum(done) == 60


def test_the_anchor_is_the_state_at_eos(embedder: Embedder) -> None:
    sequences = embedder.pairs.templated(texts(5), 48)
    batch = pack(sequences)
    found = embedder(batch)
    states = embedder.backbone.states(embedder.backbone.embed(batch.tokens), batch)
    ends = (batch.tokens == embedder.pairs.end_id).nonzero().flatten()
    torch.testing.assert_close(found, states[ends])


def test_shape_length_and_kind(embedder: Embedder) -> None:
    vectors = embedder.encode(texts(3))
    assert vectors.shape == (3, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    raw = embedder.encode(texts(3), normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), vectors, atol=1e-5)
    assert embedder.encode([]).shape == (0, 32)


def test_sides_and_instructions(tiny_folder: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(40, 48), instruction="find code")
    plain = embedder.encode(["sort"], side="document")
    query = embedder.encode(["sort"], side="query")
    np.testing.assert_allclose(query, embedder.encode([instruct("find code") + "sort"], side="query", instruction=""))
    np.testing.assert_allclose(plain, embedder.encode(["sort"], side="query", instruction=""), atol=1e-6)
    assert np.abs(plain - query).max() > 1e-3


def test_saved_and_loaded_it_is_the_same(embedder: Embedder, tmp_path: Path) -> None:
    embedder.save(tmp_path / "model", {"stage": "test"})
    again = Embedder.load(tmp_path / "model", precision="float32")
    np.testing.assert_array_equal(again.encode(texts()), embedder.encode(texts()))
    assert again.fingerprint == embedder.fingerprint
    assert again.metadata.lengths == Lengths(24, 48)
    assert again.metadata.history["stage"] == "test"


def test_a_local_base_is_remembered_by_its_absolute_path(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    embedder = Embedder.load(tiny_folder.name, precision="float32")
    assert embedder.metadata.history == {"base": str(tiny_folder)}


def test_other_weights_or_template_have_another_fingerprint(embedder: Embedder, tiny_folder: Path) -> None:
    other = Embedder.load(tiny_folder, precision="float32", template=Template("", "query: ", "", "</s>"))
    assert other.fingerprint != embedder.fingerprint


def test_bfloat16_is_near_float32(tiny_folder: Path) -> None:
    exact = Embedder.load(tiny_folder, precision="float32").encode(texts())
    rough = Embedder.load(tiny_folder, precision="bfloat16").encode(texts())
    assert (exact * rough).sum(1).min() > 0.999
    assert np.abs(exact - rough).max() > 0


def test_wrong_use_is_named(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="one string"):
        embedder.encode("text")
    with pytest.raises(InputError, match="'doc'"):
        embedder.encode(["text"], side="doc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="24 tokens leaves no room for text"):
        embedder.encode(["text"], side="query", instruction="sort " * 30)
    with pytest.raises(InputError, match="'cuda:99' asked for"):
        Embedder.load("x", device="cuda:99")


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", {"text": "a"}, ["a"], float("nan")])
def test_what_is_no_text_is_named_with_its_place(embedder: Embedder, wrong: Any) -> None:
    kind = type(wrong).__name__
    for call in (embedder.encode, embedder.embed_documents, partial(embedder.encode_query, batch_size=1)):
        with pytest.raises(InputError, match=rf"texts\[1\] is of type {kind}\. Pass strings"):
            call(["a", wrong, "b"])
        if wrong != ["a"]:
            with pytest.raises(InputError, match=f"got one {kind}"):
                call(wrong)
        with pytest.raises(InputError, match=r"texts\[0\] has a lone surrogate"):
            call(["é\ud800"])


def test_printed_it_is_one_line(embedder: Embedder, tiny_folder: Path) -> None:
    limits = "queries up to 24 tokens, documents up to 48"
    assert repr(embedder) == f"Embedder('{tiny_folder}', 32 dimensions, {limits}, on cpu)"


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        read_metadata(tmp_path)


@pytest.mark.slow
def test_many_short_texts_stream_without_growing(embedder: Embedder) -> None:
    """Never more than a window ahead of what was yielded, and nothing kept of what was: memory stays as it is."""
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for number in range(12 * 4096):
            read += 1
            yield f"row {number % 97}"

    held: list[int] = []
    tracemalloc.start()
    try:
        for number, vectors in enumerate(embedder.stream(texts()), 1):
            assert vectors.shape == (4096, embedder.dimension)
            assert read == number * 4096
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(held) == 12
    assert max(held[3:]) - held[2] < 200_000  # a window's texts alone are more


def test_a_trained_model_on_the_hub_is_the_folder_it_was(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Template("<s>", "read: ", " :end", "</s>")
    trained = Embedder.load(tiny_folder, template=template, lengths=Lengths(40, 48), instruction="find code")
    commit = "0" * 40
    repository = tmp_path / "models--somebody--trained"
    trained.save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = Embedder.load("somebody/trained")
    assert loaded.metadata == trained.metadata
    np.testing.assert_allclose(loaded.encode(texts(3), "query"), trained.encode(texts(3), "query"))
    (repository / "snapshots" / commit / METADATA).unlink()
    assert Embedder.load("somebody/trained").metadata.prompts == Prompts()


@pytest.mark.slow
def test_threads_share_an_embedder(embedder: Embedder) -> None:
    """Queries and documents, whose limits differ, at once: what one thread gives, many times."""
    long = ["sort the list of values " * 20, "open a file and read it line by line " * 20, *texts(6)]
    sides: tuple[Side, Side] = ("query", "document")
    alone = {side: embedder.encode(long, side) for side in sides}
    work = [sides[number % 2] for number in range(300)]
    with ThreadPoolExecutor(8) as threads:
        for side, vectors in zip(work, threads.map(lambda side: embedder.encode(long, side), work), strict=True):
            np.testing.assert_allclose(vectors, alone[side], atol=1e-5)
    assert not any(module.training for module in embedder.modules())


def test_encoding_does_not_switch_dropout_on(embedder: Embedder) -> None:
    embedder.encode(["sort"])
    assert not embedder.training
    embedder.train()
    embedder.encode(["sort"])
    assert all(module.training for module in embedder.modules()), "training goes on after a look at its vectors"

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedder.encode(texts(), progress=interrupt)
    assert embedder.training, "and after one that is interrupted"


def test_windows_are_bounded_by_characters(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchorembed.model.embedder._WINDOW_CHARACTERS", 1000)
    long = ["sort the list " * 20] * 9
    assert [len(window) for window in embedder.stream(long)] == [4, 4, 1]


def test_names_that_users_know(tiny_folder: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(40, 48), instruction="find code")
    some = texts(7)
    queries, documents = embedder.encode(some, "query"), embedder.encode(some)
    for batch_size in (None, 1, 3):
        np.testing.assert_allclose(embedder.encode_query(some, batch_size=batch_size), queries, atol=1e-6)
        np.testing.assert_allclose(embedder.encode_document(some, batch_size=batch_size), documents, atol=1e-6)
    for below_one in (0, -1):
        with pytest.raises(InputError, match=f"batch_size: {below_one} is below 1"):
            embedder.encode_query(some, batch_size=below_one)
    np.testing.assert_allclose(embedder.encode_query(some[0]), queries[0], atol=1e-6)
    np.testing.assert_allclose(embedder.embed_query(some[0]), queries[0], atol=1e-6)
    np.testing.assert_allclose(embedder.embed_documents(some), documents, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(queries, 2 * documents), queries @ documents.T, atol=1e-6)
    assert embedder.similarity(queries[0], documents).shape == (1, 7)
    assert embedder.encode_document([]).shape == (0, 32)
    assert embedder.device == torch.device("cpu")


def test_a_hub_that_does_not_answer_is_asked_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="the hub does not answer"):
        Embedder.load("somebody/missing")
    cached = tmp_path / "models--somebody--plain"
    shutil.copytree(tiny_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert Embedder.load("somebody/plain", precision="float32").encode(["a"]).shape == (1, 32)
    assert "Retrying" not in caplog.text
