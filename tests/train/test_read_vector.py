"""Reading a vector: after Stage I has learned a few texts the decoder tells them from their vectors, before not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorembed import api
from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.recipe_schema import Reconstruct
from anchorembed.train.read_vector import NEUTRAL, Reading, VectorReading, read, stage_one_form
from anchorembed.train.stage import step
from stages import make, ready

TEXTS = ["sort the table", "open a server", "delete one link", "read each line"]


@pytest.fixture(scope="module")
def untrained() -> Embedder:
    return make("llama")[0]


@pytest.fixture(scope="module")
def trained() -> Embedder:
    """A tiny model whose Stage I has learned four texts by heart, bags among what it learns."""
    embedder, _ = make("llama")
    pairs = embedder.pairs.tokenize([TextPair(text, text) for text in TEXTS], [""] * len(TEXTS))
    stage = ready(embedder, Reconstruct(batch_size=4, bag_weight=1.0))
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=3e-3)
    for number in range(150):
        step(stage, number, pairs)
        optimizer.step()
        optimizer.zero_grad()
    return embedder


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS[:2])
def test_what_stage_one_has_learned_is_read(trained: Embedder, text: str) -> None:
    other = TEXTS[3]
    reading = read(trained, text, other=other)
    assert reading.own.writes == text
    assert reading.against.writes == other
    assert reading.ratio is not None
    assert reading.ratio > 1
    assert reading.is_read
    assert "reads the vector" in reading.verdict
    spelled = trained.pairs.plain([text], 40)[0]
    pieces = {trained.tokenizer.decode([token]).strip() for token in spelled}
    assert {word for word, _ in reading.own.words[:3]} <= pieces
    shares = [share for _, share in reading.own.words]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_a_vector_that_says_another_text_makes_this_one_less_likely(trained: Embedder) -> None:
    wrong = trained.encode([TEXTS[3]], normalize=False)[0]
    reading = read(trained, TEXTS[0], other=TEXTS[0], vector_H=wrong)
    assert reading.ratio is not None
    assert reading.ratio < -1
    assert not reading.is_read
    assert "reads nothing" in reading.verdict


def test_the_same_vector_twice_says_nothing(untrained: Embedder) -> None:
    reading = read(untrained, TEXTS[0], other=TEXTS[0])
    assert reading.own == reading.against
    assert reading.ratio == pytest.approx(0, abs=1e-5)
    assert Reading(reading.own, reading.against, "x", 0.1, 5, len(NEUTRAL)).is_read
    assert not Reading(reading.own, reading.against, "x", 0.1, 5, len(NEUTRAL) - 1).is_read
    assert not Reading(reading.own, reading.against, "x", -0.1, 5, len(NEUTRAL)).is_read


def test_the_verdict_says_which_vector_makes_the_text_likelier() -> None:
    nothing = VectorReading([], "")
    for ratio, word in ((0.1, "likelier"), (-0.1, "less likely")):
        words = f"{word} than from the other's by 0.100"
        assert f"its text is {words} nats a token over 5 tokens" in Reading(nothing, nothing, "x", ratio, 5, 3).verdict


@pytest.mark.slow
def test_an_untrained_model_is_not_read_where_a_trained_one_is(untrained: Embedder, trained: Embedder) -> None:
    ratios = {embedder: [read(embedder, text).ratio or 0.0 for text in TEXTS] for embedder in (untrained, trained)}
    assert abs(np.mean(ratios[untrained])) < 0.3
    assert np.mean(ratios[trained]) > 1


def test_the_bag_is_the_heads_distribution_of_the_anchor(untrained: Embedder) -> None:
    anchor_1H = torch.tensor(untrained.encode(TEXTS[:1], normalize=False))
    weight_VH = untrained.backbone.head.weight.detach()
    shares_V = (anchor_1H @ weight_VH.T).softmax(-1)[0]
    words = {untrained.tokenizer.decode([token]).strip(): float(share) for token, share in enumerate(shares_V)}
    bag = read(untrained, TEXTS[0]).own.words
    assert len(bag) == 10
    assert all(words[word] == pytest.approx(share, rel=1e-4) for word, share in bag if word in words)


def test_a_stored_vector_says_what_its_text_does(untrained: Embedder) -> None:
    """As it is; of length 1, with the mean length of the model's own, which differ little."""
    vector_H = untrained.encode(TEXTS[:1], normalize=False)[0]
    by_text = read(untrained, TEXTS[0])
    assert read(untrained, TEXTS[0], vector_H=vector_H) == by_text
    unit_H = vector_H / np.linalg.norm(vector_H)
    by_unit = read(untrained, None, vector_H=unit_H)
    lengths = np.linalg.norm(untrained.encode([NEUTRAL[0], *NEUTRAL], normalize=False), axis=1)
    by_length = read(untrained, None, vector_H=unit_H * lengths.mean())
    assert by_unit.own.writes == by_length.own.writes
    assert [share for _, share in by_unit.own.words] == pytest.approx([share for _, share in by_length.own.words])
    assert (by_unit.ratio, by_unit.is_read) == (None, False)
    assert "Give the vector's text" in by_unit.verdict
    with pytest.raises(InputError, match="it has 3 components, and the model's have 32"):
        read(untrained, None, vector_H=unit_H[:3])
    for nothing in ("", None):
        with pytest.raises(InputError, match="a text is missing, or has no token"):
            read(untrained, nothing)


def test_the_form_is_that_of_the_last_stage_one(untrained: Embedder) -> None:
    def with_plans(*plans: dict[str, object]) -> tuple[bool, bool]:
        *before, last = ({"plan": plan} for plan in plans)
        return stage_one_form(replace(untrained.metadata, history={"before": before, **last}))

    without_sink = {"reconstruct.steps": 2, "reconstruct.sink": False, "reconstruct.anchor": "centred"}
    assert stage_one_form(untrained.metadata) == (True, False)
    assert with_plans(without_sink) == (False, True)
    assert with_plans(without_sink, {"contrast.steps": 3}) == (False, True)
    assert with_plans(without_sink, {"reconstruct.steps": 2, "reconstruct.sink": True}) == (True, True)


def test_centred_anchors_are_read_without_what_texts_share(untrained: Embedder) -> None:
    centred, raw = make("llama")[0], untrained
    plan = {"reconstruct.steps": 1, "reconstruct.sink": True, "reconstruct.anchor": "centred"}
    centred.metadata = replace(centred.metadata, history={"plan": plan})
    assert read(centred, TEXTS[0]).own.words != read(raw, TEXTS[0]).own.words


def test_a_file_of_vectors_is_read_by_id(tiny_folder: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.parquet"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    api.encode(tiny_folder, texts, out)
    reading = api.read(tiny_folder, TEXTS[1], vectors=out, id_="2")
    assert reading.own.writes == api.read(tiny_folder, None, vectors=out, id_="2").own.writes
    assert reading.tokens is not None
    assert reading.tokens > 1
    (tmp_path / "parts").mkdir()
    out.rename(tmp_path / "parts" / "part-0.parquet")  # as Ray's workers write them
    out = tmp_path / "parts"
    assert api.read(tiny_folder, None, vectors=out, id_="2").own.writes == reading.own.writes
    for given, message in (
        ({"id_": "9"}, "no vector has the id '9'"),
        ({}, "which vector is to be read"),
        ({"id_": "1", "vectors": texts}, "cannot be read"),
        ({"id_": "1", "vectors": tmp_path / "none"}, "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            api.read(tiny_folder, **({"vectors": out} | given))  # type: ignore[arg-type]
