"""Attention within packed sequences: both ways against a plain computation, values and gradients; compiled too.

The varlen kernel runs on GPUs alone; stand-ins for its two operators (``stand_ins.py``) take its place.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anchorembed.model import attention
from anchorembed.model.adapters import add_lora
from anchorembed.model.backbone import Backbone
from anchorembed.model.compile_layers import compile_layers
from anchorembed.model.packing import PackedBatch, pack
from anchorembed.system.device import autocast
from stand_ins import varlen_on_the_cpu
from tiny import ARCHITECTURES, reproduced, tiny_model

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (3, 17, 9, 1, 16)
VARLEN = ["llama", "qwen3", "mistral", "granite"]
CPU = torch.device("cpu")


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None = None) -> Tensor:
    """Attention of one text, [L, A, D], one query and head at a time, in float64."""
    groups = q.shape[1] // k.shape[1]
    result = torch.zeros_like(q, dtype=torch.float64)
    for head in range(q.shape[1]):
        for row in range(len(q)):
            first = 0 if window is None else max(0, row + 1 - window)
            scores = k[first : row + 1, head // groups].double() @ q[row, head].double() * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            result[row, head] = scores.softmax(0) @ v[first : row + 1, head // groups].double()
    return result


def packed_plain(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rest: Any) -> Tensor:
    return torch.cat([plain(q[a:b], k[a:b], v[a:b], *rest) for a, b in pairwise(ends.tolist())])


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(400, (length,), generator=generator).tolist() for length in lengths])


def sides(heads: int, key_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    total = sum(LENGTHS)
    return [torch.randn(total, n, 8, generator=generator, requires_grad=True) for n in (heads, key_heads, key_heads)]


@pytest.mark.parametrize(
    ("heads", "key_heads", "window", "softcap"), [(4, 2, None, None), (4, 4, 5, None), (6, 2, 3, 2.0), (2, 2, 1, None)]
)
@pytest.mark.parametrize("at_once", [2**21, 16])
def test_bucketed_equals_plain(
    heads: int,
    key_heads: int,
    window: int | None,
    softcap: float | None,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", at_once)
    inputs, batch = sides(heads, key_heads), batch_of()
    slope = torch.randn(sum(LENGTHS), heads, 8, generator=torch.Generator().manual_seed(3))
    ours, _ = attention._bucketed(*inputs, batch.offsets, 0.3, window, softcap)
    expected = packed_plain(*inputs, batch.offsets, 0.3, window, softcap)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)
    into = torch.autograd.grad(ours, inputs, slope)
    for one, other in zip(into, torch.autograd.grad(expected, inputs, slope.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_large_scores_have_finite_gradients() -> None:
    """Padding beside a text, whose scores are far above those of its first token alone, adds nothing."""
    lengths, generator = (9, 10), torch.Generator().manual_seed(0)
    inputs = [torch.randn(19, 2, 8, generator=generator) for _ in range(3)]
    inputs[1][8] = 100 * inputs[0][0]  # as far as the padding after the first text can see
    leaves, batch = [side.requires_grad_() for side in inputs], batch_of(lengths)
    slope = torch.randn(19, 2, 8, generator=generator)
    ours, _ = attention._bucketed(*leaves, batch.offsets, 1.0, None, None)
    expected = packed_plain(*leaves, batch.offsets, 1.0, None)
    into = torch.autograd.grad(ours, leaves, slope)
    for one, other in zip(into, torch.autograd.grad(expected, leaves, slope.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_bucketed_is_an_operator_that_the_compiler_can_hold() -> None:
    inputs, batch = sides(4, 2), batch_of()
    torch.library.opcheck(attention._bucketed, (*inputs, batch.offsets, 0.3, 4, 2.0))


def test_dropout_of_probabilities_keeps_their_mean_and_is_off_at_zero() -> None:
    inputs, batch = [side.detach() for side in sides(4, 2)], batch_of()
    arguments = (*inputs, batch.offsets, 0.3)
    exact, _ = attention._bucketed(*arguments, 4, 2.0)
    torch.testing.assert_close(attention._with_dropout(*arguments, 0.0, 4, 2.0), exact, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    drawn = torch.stack([attention._with_dropout(*arguments, 0.25, 4, 2.0) for _ in range(400)])
    assert not torch.allclose(drawn[0], exact, atol=1e-2)
    assert float((drawn.mean(0) - exact).abs().max()) < 0.3


# --- The varlen way --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _stand_ins() -> None:
    varlen_on_the_cpu()


def measured(name: str) -> Backbone:
    return reproduced(tiny_model(name).eval(), name)


def with_adapters(backbone: Backbone, dropout: float = 0.0) -> Backbone:
    torch.manual_seed(3)
    add_lora(backbone, 4, 8, dropout, ALL_LINEAR)
    for key, weight in backbone.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(weight, std=0.1)
    return backbone


def run(backbone: Backbone, batch: PackedBatch, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """States, and gradients of all trained weights after one backward pass through a random readout."""
    readout = torch.randn(len(batch.tokens), 32, generator=torch.Generator().manual_seed(2))
    with autocast(CPU, dtype):
        states = backbone.states(backbone.embed(batch.tokens), batch)
    weights = [weight for weight in backbone.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad((states.float() * readout).sum(), weights, allow_unused=True)
    return [states.detach().float(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_equals_bucketed(name: str, lora: bool) -> None:
    backbone = with_adapters(measured(name)) if lora else measured(name)
    expected = run(backbone, batch_of())
    backbone.varlen = True
    for ours, other in zip(run(backbone, batch_of()), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


def test_a_wrong_window_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one, as torch counts a window without the query itself, the states differ."""
    right: Callable[..., Tensor] = attention.varlen_attn
    backbone = measured("mistral")
    expected = run(backbone, batch_of())[0]

    def off_by_one(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Tensor:
        return right(*args, window_size=(window_size[0] + 1, 0), **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", off_by_one)
    backbone.varlen = True
    assert not torch.allclose(run(backbone, batch_of())[0], expected, atol=1e-3)


# --- Compiled layers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_varlen", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_equals_plain(name: str, is_varlen: bool) -> None:
    if is_varlen and name not in VARLEN:
        pytest.skip("not by the varlen kernel")
    backbone = measured(name)
    backbone.varlen = is_varlen
    expected = run(backbone, batch_of())
    assert compile_layers(backbone, torch.float32, backend="aot_eager")
    for ours, other in zip(run(backbone, batch_of()), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_layers_share_one_graph_whatever_the_lengths(lora: bool) -> None:
    """Twenty batches of other lengths and counts, adapters or none: one graph, traced once, numbers in it constant."""
    torch._dynamo.reset()
    backbone = with_adapters(measured("llama"), dropout=0.1) if lora else measured("llama")
    backbone.train()
    backbone.varlen = True
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    assert compile_layers(backbone, torch.bfloat16, backend=counting)  # type: ignore[arg-type]
    for number in range(20):
        run(backbone, batch_of(tuple(range(2, 4 + number))), torch.bfloat16)
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if node.target == "item"]


def test_a_compiler_that_fails_leaves_the_layers_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: object) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    backbone = measured("llama")
    expected = run(backbone, batch_of())[0]
    assert not compile_layers(backbone, torch.float32, backend=failing)  # type: ignore[arg-type]
    assert "layers are not compiled, slower" in caplog.text
    torch.testing.assert_close(run(backbone, batch_of())[0], expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_bfloat16_states_are_near_float32(name: str) -> None:
    backbone = measured(name)
    exact = run(backbone, batch_of())[0]
    relative = [float((run(backbone, batch_of(), torch.bfloat16)[0] - exact).norm() / exact.norm())]
    backbone.residual_dtype = torch.bfloat16
    relative.append(float((run(backbone, batch_of(), torch.bfloat16)[0] - exact).norm() / exact.norm()))
    assert 0 < relative[0] < 0.02
    assert relative[0] < relative[1] < 0.05
