"""Other forms of Stage I: centred anchors and first target tokens, by hand, in micro-batches; recomputing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anchorembed.recipe_schema import Contrast, Reconstruct
from anchorembed.train.anchors import centred
from anchorembed.train.decoder_input import decoding, target_count
from anchorembed.train.reconstruct import Reconstruction
from anchorembed.train.reconstruction_batch import ReconstructionBatch
from anchorembed.train.stage import step
from stages import make, ready, same_in_micro_batches, stage

ANCHORS = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, -1.0], [5.0, 7.0]])
SIDES = torch.tensor([0, 0, 1, 1])


def test_centred_anchors_by_hand() -> None:
    """Means are [2, 2] and [5, 3]; what is left of each anchor is made 10 long."""
    found = centred(ANCHORS, SIDES, torch.tensor(10.0))
    root = 5**0.5
    expected = torch.tensor([[-10 / root, -20 / root], [10 / root, 20 / root], [0.0, -10.0], [0.0, 10.0]])
    torch.testing.assert_close(found, expected)


def test_a_centred_gradient_leaves_values_and_takes_the_mean_off_gradients() -> None:
    anchors = ANCHORS.clone().requires_grad_()
    found = centred(anchors, SIDES, torch.tensor(10.0), gradient_only=True)
    assert torch.equal(found, ANCHORS)
    found.backward(torch.tensor([[1.0, 2.0], [3.0, 2.0], [0.0, 0.0], [0.0, 8.0]]))
    assert torch.equal(anchors.grad, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -4.0], [0.0, 4.0]]))


@pytest.mark.parametrize("anchor", ["centred", "centred_gradient"])
@pytest.mark.parametrize("budget", [130, 170])
def test_micro_batches_are_one_step(anchor: str, budget: int) -> None:
    same_in_micro_batches(budget, anchor=anchor, bag_weight=0.5)


def test_in_bfloat16_means_are_as_exact_as_in_float32() -> None:
    """Whatever the step runs in, as anchors that are nearly alike differ by less than bfloat16 can tell."""
    alike = 8 + 1e-3 * ANCHORS
    exact = centred(alike, SIDES, torch.tensor(10.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(centred(alike, SIDES, torch.tensor(10.0)), exact)


def test_means_of_micro_batches_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the whole step's means the test above fails."""

    def apart(own: Reconstruction, batch: ReconstructionBatch) -> tuple[Tensor, Tensor]:
        found = [own._backward(replace(batch, micro_batches=[micro])) for micro in batch.micro_batches]
        return sum((sums for sums, _ in found), torch.zeros(())), found[0][1]

    monkeypatch.setattr(Reconstruction, "_cached_backward", apart)
    with pytest.raises(AssertionError):
        test_micro_batches_are_one_step("centred", 130)


def test_the_first_target_tokens_only_and_no_end_after_a_cut() -> None:
    laid = decoding([[7, 8, 9, 10], [4], [5, 6]], end_id=2, limit=2)
    assert laid.counts == (2, 2, 3)
    assert laid.targets.tolist() == [7, 8, 4, 2, 5, 6, 2]
    slots, lasts = laid.slots.tolist(), laid.batch.anchors.tolist()
    written = [laid.batch.tokens[slot + 1 : last + 1].tolist() for slot, last in zip(slots, lasts, strict=True)]
    assert written == [[7], [4], [5, 6]]
    assert [target_count([1] * length, 2) for length in (0, 1, 2, 3)] == [1, 2, 3, 2]


def test_a_limit_above_all_texts_is_none() -> None:
    embedder, pairs = make("llama")
    whole = step(stage(embedder), 0, pairs)
    assert step(stage(embedder, target_tokens=1000), 0, pairs) == whole
    assert step(stage(embedder, target_tokens=3), 0, pairs) != whole


@pytest.mark.parametrize("settings", [Reconstruct(), Contrast(hard_negatives=0)])
@pytest.mark.parametrize("budget", [200, 10_000])
def test_recomputing_changes_no_gradient(settings: Reconstruct | Contrast, budget: int) -> None:
    """Dropout is drawn again as it was; only what is kept differs."""
    found = []
    for recompute in (False, True):
        embedder, pairs = make("llama")
        torch.manual_seed(1)
        run = ready(embedder, settings.model_copy(update={"recompute": recompute}), budget)
        module = run.module.train()
        torch.manual_seed(2)
        loss = step(run, 0, [replace(pair, negatives=()) for pair in pairs])["loss"]
        found.append([torch.tensor(loss), *(p.grad for p in module.parameters() if p.grad is not None)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)
