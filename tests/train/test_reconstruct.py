"""Stage I's loss equals a plain computation, in chunks or whole, and every target is where it should be."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_schema import Contrast, Reconstruct
from anchorembed.train import cross_entropy as reconstruction
from anchorembed.train.cross_entropy import linear_cross_entropy
from anchorembed.train.decoder_input import decoding, insert_anchors
from anchorembed.train.flops import weight_count
from anchorembed.train.stage import step
from stages import PAIRS, make, ready, same_in_micro_batches, stage
from tiny import tiny_model


def plain_loss(
    name: str, pairs: list[TokenPair], sink: bool, bag_weight: float = 0.0, decode: bool = True
) -> tuple[Tensor, torch.nn.Module]:
    """0.8 D2Q + 0.2 Q2D: one pair at a time, all logits at once, by the model's own forward with its own attention.

    The bag is the model's own logits after EOS, asked for every target.
    """
    model = tiny_model(name).eval()
    model.set_attn_implementation("eager")
    embedding = model.get_input_embeddings()
    scale = getattr(model.config, "embedding_multiplier", 1.0)  # Granite multiplies whatever vectors it is given
    end = pairs[0].query[-1]
    total = torch.zeros(())
    for weight, sides in (
        (0.2, [(p.query, p.document_text) for p in pairs]),
        (0.8, [(p.document, p.query_text) for p in pairs]),
    ):
        losses, bags = [], []
        for source, text in sides:
            states = model.base_model(input_ids=torch.tensor([source]), use_cache=False).last_hidden_state
            said = model(input_ids=torch.tensor([source]), use_cache=False).logits[0, -1:].expand(len(text) + 1, -1)
            bags.append(F.cross_entropy(said, torch.tensor([*text, end]), reduction="none"))
            anchor = states[0, -1:] / scale
            before = embedding(torch.tensor([end] * sink, dtype=torch.long))
            inputs = torch.cat([before, anchor, embedding(torch.tensor(text, dtype=torch.long))])
            logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0, int(sink) :]
            losses.append(F.cross_entropy(logits, torch.tensor([*text, end]), reduction="none"))
        total = total + weight * (decode * torch.cat(losses).mean() + bag_weight * torch.cat(bags).mean())
    return total, model


@pytest.mark.parametrize(
    ("sink", "bag_weight", "decode"), [(False, 0.0, True), (True, 0.0, True), (True, 0.7, True), (False, 0.7, False)]
)
@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma2", "granite", "qwen3", "mistral"])
def test_loss_and_gradients_equal_a_plain_computation(name: str, sink: bool, bag_weight: float, decode: bool) -> None:
    embedder, pairs = make(name)
    expected, model = plain_loss(name, pairs, sink, bag_weight, decode)
    expected.backward()
    metrics = step(stage(embedder, sink=sink, bag_weight=bag_weight, decode=decode), 0, pairs)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    ours = dict(embedder.backbone.model.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(("budget", "bag_weight"), [(130, 0.0), (130, 0.7), (170, 0.0), (220, 0.0)])
def test_accumulation_equals_one_big_batch(budget: int, bag_weight: float) -> None:
    same_in_micro_batches(budget, bag_weight=bag_weight)


def test_a_mean_of_means_would_be_seen() -> None:
    """The texts are so unequal that averaging micro-batch means gives another loss: the test above can fail."""
    embedder, pairs = make("llama")
    means = [step(stage(embedder), 0, [pair])["loss"] for pair in pairs]
    assert abs(sum(means) / len(means) - step(stage(embedder), 0, pairs)["loss"]) > 1e-3


@pytest.mark.parametrize("sink", [False, True])
def test_the_anchor_is_adjacent_to_the_first_target_whatever_the_batch(sink: bool) -> None:
    texts = [[7, 8, 9], [4], [], [5] * 30]
    laid = decoding(texts, end_id=2, sink=sink)
    targets = dict(zip(laid.predicting.tolist(), laid.targets.tolist(), strict=True))
    assert list(laid.counts) == [len(text) + 1 for text in texts]
    for text, slot, last in zip(texts, laid.slots.tolist(), laid.batch.anchors.tolist(), strict=True):
        assert [targets.pop(position) for position in range(slot, last + 1)] == [*text, 2]
        assert laid.batch.tokens[slot + 1 : last + 1].tolist() == text
        assert laid.batch.positions[slot] == sink
    assert not targets  # the sink predicts nothing


def test_every_target_sends_gradient_into_the_encoder() -> None:
    embedder, pairs = make("llama")
    laid = decoding([pair.document_text for pair in pairs], embedder.pairs.end_id)
    anchors = torch.randn(len(pairs), 32, requires_grad=True)
    backbone = embedder.backbone
    vectors = insert_anchors(backbone.embed(laid.batch.tokens), anchors, laid.slots)
    states = backbone.states(vectors, laid.batch)
    owner = torch.arange(len(pairs)).repeat_interleave(laid.batch.offsets.diff())
    for position in range(len(laid.targets)):
        weights = torch.zeros(len(laid.targets))
        weights[position] = 1.0
        loss, _ = linear_cross_entropy(states, backbone.head.weight, laid.targets, weights)
        (gradient,) = torch.autograd.grad(loss, anchors, retain_graph=True)
        touched = gradient.abs().sum(1).nonzero().flatten().tolist()
        assert touched == [int(owner[position])]


def test_targets_are_the_text_and_eos_only() -> None:
    embedder, pairs = make("llama")
    laid = decoding([pair.query_text for pair in pairs], embedder.pairs.end_id)
    assert embedder.tokenizer.decode(laid.targets.tolist()) == "".join(pair.query + "</s>" for pair in PAIRS)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_chunked_equals_full(softcap: float | None, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    states, weight, bias = leaf(70, 8), leaf(50, 8), leaf(50) if biased else None
    targets = torch.randint(50, (70,), generator=generator)
    weights = torch.rand(70, generator=generator)
    monkeypatch.setattr(reconstruction, "CHUNK_LOGITS", {"cpu": 50 * 20})
    loss, losses = linear_cross_entropy(states, weight, targets, weights, bias, 1.5, softcap)
    (loss * 3).backward()
    leaves = [leaf for leaf in (states, weight, bias) if leaf is not None]
    found = [leaf.grad for leaf in leaves]
    logits = 1.5 * F.linear(states, weight) if bias is None else 1.5 * F.linear(states, weight, bias / 1.0)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    full = F.cross_entropy(capped, targets, reduction="none")
    expected = torch.autograd.grad((full * weights).sum() * 3, leaves)
    torch.testing.assert_close(losses, full.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_chunk_is_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    compute = reconstruction._loss_and_gradient

    def watched(products: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        assert not any(made_before() is not None for made_before in made), "an earlier chunk is still in memory"
        losses, gradient = compute(products, *others)
        made.extend(map(weakref.ref, (products, gradient)))
        return losses, gradient

    monkeypatch.setattr(reconstruction, "CHUNK_LOGITS", {"cpu": 50 * 20})
    monkeypatch.setattr(reconstruction, "_loss_and_gradient", watched)
    states, weight = (torch.randn(rows, 8, requires_grad=True) for rows in (70, 50))
    linear_cross_entropy(states, weight, torch.arange(70) % 50, torch.ones(70))
    assert len(made) == 2 * 4


def test_directions() -> None:
    embedder, pairs = make("llama")
    both = step(stage(embedder), 0, pairs)
    first, second = (step(stage(embedder, directions="alternate"), number, pairs) for number in (0, 1))
    assert first["loss"] == pytest.approx(both["loss_q2d"], abs=1e-5)
    assert second["loss"] == pytest.approx(both["loss_d2q"], abs=1e-5)
    assert both["loss"] == pytest.approx(0.8 * both["loss_d2q"] + 0.2 * both["loss_q2d"], abs=1e-5)


def test_auto_encoding_is_q2d_with_the_document_as_query() -> None:
    embedder, pairs = make("llama")
    doubled = [replace(pair, query=pair.document) for pair in pairs]
    expected = step(stage(embedder, directions="q2d"), 0, doubled)["loss"]
    found = stage(embedder, directions="d2d")
    assert step(found, 0, pairs)["loss"] == pytest.approx(expected, abs=1e-5)
    assert "gain_d2d" in found.report(pairs)


def test_the_recipe_decides_on_the_sink_which_costs_one_token_a_text() -> None:
    embedder, pairs = make("llama")
    without, with_sink = (ready(embedder, Reconstruct(sink=sink)) for sink in (False, True))
    assert step(with_sink, 0, pairs)["loss"] != pytest.approx(step(without, 0, pairs)["loss"], abs=1e-4)
    backbone = embedder.backbone
    more = with_sink.flops(0, pairs) - without.flops(0, pairs)
    assert more == 6 * weight_count(backbone) * 2 * len(pairs)


def test_a_bag_costs_a_head_a_text_and_decoding_can_be_left_out() -> None:
    embedder, pairs = make("llama")
    backbone, head = embedder.backbone, embedder.backbone.head.weight.numel()
    plain = ready(embedder, Reconstruct())
    bagged = ready(embedder, Reconstruct(bag_weight=0.5))
    alone = ready(embedder, ControlReconstruct(bag_weight=0.5, decode=False))
    texts = 2 * len(pairs)
    assert bagged.flops(0, pairs) - plain.flops(0, pairs) == 6 * head * texts
    encoded = sum(len(pair.query) + len(pair.document) for pair in pairs)
    assert alone.flops(0, pairs) == 6 * (weight_count(backbone) * encoded + head * texts)
    assert set(step(alone, 0, pairs)) == {"loss", "loss_bag_q2d", "loss_bag_d2q"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_a_bag_is_its_state_repeated(
    softcap: float | None, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (40,), generator=generator)
    states, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 8), (50, 8), (50,)))
    bags = (counts.tolist(), torch.arange(40).repeat_interleave(counts))
    targets = torch.randint(50, (int(counts.sum()),), generator=generator)
    weights = torch.rand(len(targets), generator=generator)
    monkeypatch.setattr(reconstruction, "CHUNK_LOGITS", {"cpu": 50 * 16})
    found = []
    for bag in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (states, weight, bias)]
        rows = leaves[0] if bag else leaves[0].repeat_interleave(counts, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, losses = linear_cross_entropy(
                rows, leaves[1], targets, weights, leaves[2] if biased else None, 1.5, softcap, bags if bag else None
            )
        loss.backward()
        found.append([loss.detach(), losses, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("sink", [False, True])
def test_next_tokens_are_the_model_s_own_loss(sink: bool) -> None:
    """Against transformers' forward pass on each text after EOS, without any vector of ours."""
    embedder, pairs = make("llama")
    end, model = embedder.pairs.end_id, tiny_model("llama").eval()
    total, count = 0.0, 0
    for text in (text for pair in pairs for text in (pair.query_text, pair.document_text)):
        logits = model(input_ids=torch.tensor([[end, *text]]), use_cache=False).logits[0]
        total += F.cross_entropy(logits, torch.tensor([*text, end]), reduction="sum").item()
        count += len(text) + 1
    found = step(stage(embedder, directions="next_token", sink=sink), 0, pairs)["loss"]
    assert found == pytest.approx(total / count, abs=1e-4)


def test_anchor_gain_is_zero_for_vectors_that_say_nothing() -> None:
    """If every anchor is the same, another pair's vector is as good; if they differ, a gain can show."""
    embedder, pairs = make("llama")
    bagged = stage(embedder, bag_weight=0.5)
    ordinary = bagged.report(pairs)
    assert abs(ordinary["gain_q2d"]) > 1e-4
    assert abs(ordinary["gain_bag_q2d"]) > 1e-4
    same = [replace(pair, query=pairs[0].query, document=pairs[0].document) for pair in pairs]
    gains = {name: value for name, value in bagged.report(same).items() if name.startswith("gain")}
    assert gains == pytest.approx(
        dict.fromkeys((f"gain{of}_{way}" for of in ("", "_first", "_bag") for way in ("q2d", "d2q")), 0.0), abs=1e-6
    )


def summed_losses(pairs: list[TokenPair], sources: list[list[int]], texts: list[list[int]]) -> float:
    """Of writing each text from its source's last state, after a sink, by transformers' own forward: nats, summed."""
    model, end, total = tiny_model("llama").eval(), pairs[0].query[-1], 0.0
    model.set_attn_implementation("eager")
    for source, text in zip(sources, texts, strict=True):
        anchor = model.base_model(input_ids=torch.tensor([source]), use_cache=False).last_hidden_state[0, -1:]
        known = model.get_input_embeddings()(torch.tensor([end, *text]))
        inputs = torch.cat([known[:1], anchor, known[1:]])
        logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0, 1:]
        total += F.cross_entropy(logits, torch.tensor([*text, end]), reduction="sum").item()
    return total


@torch.no_grad()
def test_anchor_gain_is_the_next_pair_s_loss_less_the_own() -> None:
    embedder, pairs = make("llama")
    found = stage(embedder, sink=True).report(pairs)
    for direction, sources, texts in (
        ("q2d", [pair.query for pair in pairs], [pair.document_text for pair in pairs]),
        ("d2q", [pair.document for pair in pairs], [pair.query_text for pair in pairs]),
    ):
        tokens = sum(len(text) + 1 for text in texts)
        own = summed_losses(pairs, sources, texts) / tokens
        strange = summed_losses(pairs, [*sources[1:], sources[0]], texts) / tokens
        assert found[f"held_out_{direction}"] == pytest.approx(own, abs=1e-4)
        assert found[f"gain_{direction}"] == pytest.approx(strange - own, abs=1e-4)
        assert abs(strange - own) > 1e-3


def test_flops_by_hand() -> None:
    """2 layers of H 32: q and o 32 x 32, k and v 16 x 32, gate, up and down 64 x 32; a head of 400 x 32."""
    embedder, pairs = make("llama")
    weights, head = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32), 400 * 32
    encoded = sum(len(pair.query) + len(pair.document) for pair in pairs)
    written = sum(len(pair.query_text) + len(pair.document_text) + 2 for pair in pairs)
    sinks = 2 * len(pairs)
    both = ready(embedder, Reconstruct())
    assert both.flops(0, pairs) == 6 * (weights * (encoded + sinks + written) + head * written)
    plain = ready(embedder, ControlReconstruct(directions="next_token"))
    assert plain.flops(0, pairs) == 6 * (weights + head) * written
    full = ready(embedder, Contrast(lora=None))
    assert full.flops(0, pairs) == 6 * weights * encoded
    adapted = ready(embedder, Contrast())
    assert adapted.flops(0, pairs) == 4 * weights * encoded
    assert replace(adapted, guide=embedder).flops(0, pairs) == (4 + 2) * weights * encoded
