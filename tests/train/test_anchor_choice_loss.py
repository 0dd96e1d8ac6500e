"""Contrast through the decoder: by hand on a tiny model, its gradients, in micro-batches, and off."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.errors import InputError
from anchorembed.model.backbone import Backbone
from anchorembed.model.tokens import TokenPair
from anchorembed.recipe_file import parse_as
from anchorembed.recipe_schema import Data, Source
from anchorembed.train import anchors, reconstruction_loss
from anchorembed.train.anchor_choice_loss import CHOICES, choose_anchors
from anchorembed.train.decoder_input import target_count
from anchorembed.train.flops import weight_count
from anchorembed.train.reconstruction_batch import ReconstructionBatch
from anchorembed.train.stage import step
from stages import make, same_in_micro_batches, stage
from tiny import tiny_model


def test_a_choice_by_hand() -> None:
    """Two texts of two and one targets, two anchors each: likelihoods of -3 and -2, and of -1 and -1."""
    losses_P = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 1.0])
    rows_P = torch.tensor([0, 0, 1, 1, 2, 3])
    found_P, slopes_P = choose_anchors(losses_P, rows_P, torch.tensor([1.0, 10.0]), choices=2)
    first, second = math.log(1 + math.e), math.log(2)
    assert found_P[[0, 1, 4]].tolist() == pytest.approx([first / 2, first / 2, second])
    wrong = math.e / (1 + math.e)
    assert slopes_P.tolist() == pytest.approx([wrong, wrong, -wrong, -wrong, 5.0, -5.0])


def test_anchors_stand_in_the_step_s_order_and_idle_ones_nowhere() -> None:
    given = torch.arange(6.0).view(3, 2).requires_grad_()
    shared = anchors.in_step_order(given, torch.tensor([1, 3, 0]), torch.tensor([0.0, 1.0, 1.0]), 4)
    assert shared.tolist() == [[4.0, 5.0], [0.0, 0.0], [0.0, 0.0], [2.0, 3.0]]
    (shared * torch.arange(4.0)[:, None]).sum().backward()
    assert given.grad is not None
    assert given.grad.tolist() == [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]


def plain_loss(
    pairs: list[TokenPair], limit: int, read_weight: float
) -> tuple[Tensor, dict[str, float], torch.nn.Module]:
    """0.8 D2Q + 0.2 Q2D and the choices of each, one text and one anchor at a time, by the model's own forward."""
    model = tiny_model("llama").eval()
    model.set_attn_implementation("eager")
    embedding, end = model.get_input_embeddings(), pairs[0].query[-1]
    total, read = torch.zeros(()), {}
    for name, weight, sides in (
        ("q2d", 0.2, [(p.query, p.document_text) for p in pairs]),
        ("d2q", 0.8, [(p.document, p.query_text) for p in pairs]),
    ):
        anchors = [
            model.base_model(input_ids=torch.tensor([source]), use_cache=False).last_hidden_state[0, -1:]
            for source, _ in sides
        ]
        written, choices = [], []
        for number, (_, text) in enumerate(sides):
            targets = [*text, end][:limit] if len(text) > limit else [*text, end]
            before = embedding(torch.tensor(targets[:-1], dtype=torch.long))
            losses = []
            for other in range(CHOICES):
                inputs = torch.cat([anchors[(number + other) % len(pairs)], before])[None]
                logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
                losses.append(F.cross_entropy(logits, torch.tensor(targets), reduction="none"))
            written.append(losses[0])
            choices.append(-torch.stack([-loss.sum() for loss in losses]).log_softmax(0)[0])
        read[name] = torch.stack(choices).mean().item()
        total = total + weight * (torch.cat(written).mean() + read_weight * torch.stack(choices).mean())
    return total, read, model


def test_loss_and_gradients_equal_a_plain_computation() -> None:
    """Gradients of all weights, so also those that reach the encoder through the own and the other anchors."""
    embedder, pairs = make("llama")
    expected, read, model = plain_loss(pairs, 5, 0.7)
    expected.backward()
    metrics = step(stage(embedder, target_tokens=5, read_weight=0.7), 0, pairs)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert {side: metrics[f"loss_read_{side}"] for side in read} == pytest.approx(read, abs=1e-5)
    ours = dict(embedder.backbone.model.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("form", [{}, {"anchor": "centred"}, {"bag_weight": 0.5, "decode": False}])
@pytest.mark.parametrize("budget", [150, 300])
def test_micro_batches_are_one_step(form: dict[str, object], budget: int) -> None:
    """Texts are written from anchors of other micro-batches, too."""
    same_in_micro_batches(budget, 5e-6, read_weight=0.7, target_tokens=8, **form)


def test_a_lost_gradient_of_anchors_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no gradient reached the encoder through anchors, the test above would fail."""

    def cut(batch: ReconstructionBatch, anchors_NH: Tensor, backbone: Backbone) -> tuple[list[Tensor], Tensor]:
        parts, contrast = anchors.decoder_anchors(batch, anchors_NH, backbone)
        return [part.detach() + 0 * anchors_NH.sum() for part in parts], contrast

    monkeypatch.setattr(reconstruction_loss, "decoder_anchors", cut)
    with pytest.raises(AssertionError):
        test_loss_and_gradients_equal_a_plain_computation()


def test_off_is_the_paper_s_form_bit_for_bit() -> None:
    """Against the loss and gradients of a weight that is next to nothing, and of none: losses are the same numbers."""
    found = []
    for read_weight in (None, 1e-30):
        embedder, pairs = make("llama")
        metrics = step(stage(embedder, read_weight=read_weight), 0, pairs)
        found.append((metrics, [parameter.grad for parameter in embedder.parameters()]))
    (off, plain), (on, nearly) = found
    assert set(on) - set(off) == {"loss_read_q2d", "loss_read_d2q"}
    assert off == pytest.approx({name: on[name] for name in off}, abs=1e-6)
    for ours, theirs in zip(plain, nearly, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_other_anchor_costs_the_targets_once_more() -> None:
    embedder, pairs = make("llama")
    backbone = embedder.backbone
    plain, reading = (stage(embedder, sink=True, target_tokens=3, read_weight=weight) for weight in (None, 1.0))
    written = sum(target_count(text, 3) for pair in pairs for text in (pair.query_text, pair.document_text))
    more = weight_count(backbone) * (written + 2 * len(pairs)) + backbone.head.weight.numel() * written
    assert reading.flops(0, pairs) - plain.flops(0, pairs) == 6 * (CHOICES - 1) * more
    data = Data(sources=[Source(name="pairs", path="pairs.jsonl")], query_tokens=24, document_tokens=40)
    sizes = [form.step_size(form.settings, data).longest for form in (plain, reading)]
    assert sizes[1] - sizes[0] == 2 * 2 * 3 * (CHOICES - 1)


@pytest.mark.parametrize("directions", ["both", "alternate", "q2d", "d2q"])
def test_the_anchors_that_a_text_chooses_from_are_of_different_pairs(directions: str) -> None:
    """Also in a step of fewer pairs than choices."""
    embedder, pairs = make("llama")
    reading = stage(embedder, directions=directions, read_weight=1.0)
    for count in range(1, CHOICES + 1):
        writings = reading.writings(0, pairs[:count])
        of_pair = {writing.rows[0]: number for number, each in enumerate(writings) for writing in each}
        for writing in (writing for each in writings for writing in each):
            assert len({of_pair[row] for row in writing.rows}) == len(writing.rows) == count


def test_next_tokens_have_no_anchor_to_choose() -> None:
    embedder, pairs = make("llama")
    plain = step(stage(embedder, directions="next_token"), 0, pairs)
    assert step(stage(embedder, directions="next_token", read_weight=1.0), 0, pairs) == plain


def test_reading_alone_is_a_loss_and_none_is_refused() -> None:
    embedder, pairs = make("llama")
    assert set(step(stage(embedder, decode=False, read_weight=1.0), 0, pairs)) == {
        "loss",
        "loss_read_q2d",
        "loss_read_d2q",
    }
    with pytest.raises(InputError, match="read_weight"):
        parse_as(ControlReconstruct, {"decode": False}, "arm")
