"""What matters on a GPU, shown on CPUs: a step waits for the device once, and nothing mixes devices.

Waiting: both stages run in the loop as they do on a GPU, attention by stand-ins for the varlen kernel, and operations
that would make the CPU wait are counted. (On an H100 torch's own ``set_sync_debug_mode`` counts one, too:
results/gpu.)

Devices: whole steps run on tensors that have a device and a shape, but no values (``FakeTensorMode``); an operation on
tensors of two devices raises. That needs a CUDA build of torch, not a GPU:

    python -c 'import torch; print(torch.version.cuda)'   # not None
    python -m pytest tests/train/test_gpu_ready.py

Without one those tests are skipped. The autograd engine asks the driver for a card, so there a backward pass only fills
in gradients of the right shape and device; what it computes is what `test_attention` and others check on the CPU.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.data.pairs import TextPair
from anchorembed.model.backbone import Backbone
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import Metadata
from anchorembed.model.packing import PackedBatch
from anchorembed.model.template import Template, bake
from anchorembed.model.tokens import Lengths, TokenPair
from anchorembed.recipe_schema import Contrast, Lora, Reconstruct, Schedule
from anchorembed.system.device import Machine, choose_device
from anchorembed.train import contrast, gradcache
from anchorembed.train import cross_entropy as reconstruction
from anchorembed.train.contrast import Contrastive
from anchorembed.train.loop import Loop, fit
from anchorembed.train.optimizer import make_optimizer
from anchorembed.train.reconstruct import Reconstruction
from stages import ready
from stand_ins import varlen_on_the_cpu
from tiny import WORDS, tiny_model, tiny_tokenizer

TEMPLATE = Template("<s>", "user: ", "", "</s>")
STAGES: dict[str, Schedule] = {
    "both directions, bags": Reconstruct(bag_weight=0.5, tokens_per_micro_batch=120),
    "paper": Reconstruct(sink=False, tokens_per_micro_batch=120),
    "first tokens": Reconstruct(target_tokens=3, tokens_per_micro_batch=120),
    "centred": Reconstruct(anchor="centred", tokens_per_micro_batch=120),
    "centred, at once": Reconstruct(anchor="centred", tokens_per_micro_batch=10_000),
    "centred gradient": Reconstruct(anchor="centred_gradient", tokens_per_micro_batch=120),
    "bags alone": ControlReconstruct(bag_weight=0.5, decode=False, tokens_per_micro_batch=120),
    "next token": ControlReconstruct(directions="next_token", tokens_per_micro_batch=120),
    "recomputed": Reconstruct(recompute=True, tokens_per_micro_batch=120),
    "adapters": Reconstruct(lora=Lora(), contrast_weight=1.0, tokens_per_micro_batch=120),
    "contrastive": Contrast(tokens_per_micro_batch=120),
    "contrastive, at once": Contrast(tokens_per_micro_batch=10_000),
    "contrastive, all weights": Contrast(lora=None, tokens_per_micro_batch=120),
    "contrastive, all options": Contrast(mask_above=0.1, distill=0.5, dimensions=[8, 16], tokens_per_micro_batch=120),
}
Stage = Reconstruction | Contrastive


def stage(settings: Schedule, name: str = "llama") -> tuple[nn.Module, Stage, list[TokenPair]]:
    """A stage of a tiny model whose attention is the varlen kernel's, and pairs with negatives and scores."""
    backbone = Backbone(tiny_model(name))
    backbone.varlen = True
    embedder = Embedder(backbone, bake(tiny_tokenizer(), TEMPLATE), Metadata(TEMPLATE, Lengths(24, 40)))
    run = ready(embedder, settings)
    module = run.module
    texts = [" ".join(WORDS[first : first + 1 + first % 5]) for first in range(12)]
    pairs = [TextPair(*texts[3 * i : 3 * i + 2], (texts[3 * i + 2],), scores=(1.0, 0.5)) for i in range(4)]
    return module.train(), run, embedder.pairs.tokenize(pairs, [""] * 4)


# --- Waiting ---------------------------------------------------------------------------------------------------------

_VALUES_DECIDE = {  # operators whose result has a shape, or is a number, that a device must tell the CPU
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "masked_select",
    "segment_reduce",
    "_segment_reduce_backward",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "histc",
}
_TO_PYTHON = {"tolist", "numpy", "cpu", "__array__", "tensor", "as_tensor", "from_numpy"}  # and from it, by a copy


class _Operators(TorchDispatchMode):
    """Notes operators that wait, also of the backward pass."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        uncounted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _VALUES_DECIDE or by_mask or uncounted:
            self.found.append(_place())
        with torch._C.DisableTorchFunction():  # what a kernel of ours does inside is the kernel's affair
            return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Notes copies to Python or the CPU, and from them, which reach no operator where the device is the CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # By name alone: `to(other.device)` is no copy where the other is on the device, too.
        to_cpu = name == "to" and any(isinstance(part, str) for part in [*args[1:], *(kwargs or {}).values()])
        if name in _TO_PYTHON or to_cpu:
            self.found.append(_place())
            with torch._C.DisableTorchFunction():  # one wait, whatever it is made of
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost function of this package that is running, or of this file."""
    ours = [frame.name for frame in traceback.extract_stack() if "anchorembed" in Path(frame.filename).parts]
    return ours[-1] if ours else "here"


@contextmanager
def waits() -> Iterator[list[str]]:
    """Where the CPU would wait for a GPU, as it comes there; of this thread."""
    found: list[str] = []
    with _Calls(found), _Operators(found):
        yield found


@pytest.fixture(scope="module", autouse=True)
def _stand_ins() -> None:
    varlen_on_the_cpu()


def waits_of_a_run(settings: Schedule, folder: Path, disturb: Callable[[nn.Module], object] | None = None) -> list[str]:
    """Of two steps in the loop, from their preparation in a thread to the optimizer's."""
    module, run, pairs = stage(settings)
    if disturb is not None:
        disturb(module)
    schedule = Schedule(steps=2, warmup_steps=1, evaluate_every=0)
    with waits() as found:
        fit(
            Loop("stage", schedule, 0, folder, str, {}),
            module,
            make_optimizer(module, schedule),
            Accelerator(cpu=True),
            lambda number, _: (run.make_batch(number, pairs), {}),
            run.run,
            lambda _: iter([[0], [0]]),
            dict,
        )
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_step_waits_for_the_device_once(name: str, tmp_path: Path) -> None:
    assert waits_of_a_run(STAGES[name], tmp_path) == ["read_back", "read_back"]


def forwards(module: nn.Module) -> None:
    def ask(_: nn.Module, __: Any, states: Tensor) -> None:
        states.sum().item()

    next(part for part in module.modules() if isinstance(part, Backbone)).layers[0].mlp.register_forward_hook(ask)


def backwards(module: nn.Module) -> None:
    def ask(_: nn.Module, gradients: Any, __: Any) -> None:
        gradients[0].sum().item()

    layers = next(part for part in module.modules() if isinstance(part, Backbone)).layers
    layers[0].mlp.register_full_backward_hook(ask)


@pytest.mark.parametrize("disturb", [forwards, backwards])
@pytest.mark.parametrize("name", ["centred", "contrastive"])
def test_one_more_wait_is_seen(name: str, disturb: Callable[[nn.Module], object], tmp_path: Path) -> None:
    assert len(waits_of_a_run(STAGES[name], tmp_path, disturb)) > 2


VALUES = torch.tensor([3.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: VALUES.sum().item(),
        lambda: float(VALUES[0]),
        lambda: bool((VALUES > 0).any()),
        VALUES.tolist,
        VALUES.cpu,
        lambda: VALUES.to("cpu"),
        VALUES.numpy,
        lambda: VALUES[VALUES > 0],
        lambda: VALUES.clone().__setitem__(VALUES > 0, VALUES[:2]),
        lambda: VALUES.masked_select(VALUES > 0),
        VALUES.nonzero,
        VALUES.unique,
        lambda: VALUES.repeat_interleave(VALUES.long()),
        lambda: torch.equal(VALUES, VALUES),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.segment_reduce(VALUES, "sum", lengths=torch.ones(3, dtype=torch.long)),
    ],
)
def test_each_kind_of_wait_is_counted_once(wait: Callable[[], object]) -> None:
    with waits() as found:
        wait()
    assert len(found) == 1


def test_what_needs_no_value_is_not_counted() -> None:
    with waits() as found:
        VALUES.repeat_interleave(VALUES.long(), output_size=4)
        VALUES[torch.zeros(2, dtype=torch.long)].masked_fill(VALUES[:2] > 0, 1.0).to(torch.bfloat16)
    assert found == []


# --- One card of several ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "name"), [(1, "cuda:1"), (2, "cuda")])
def test_a_guide_is_on_the_card_of_its_process(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's number is refused where there are several processes: torch's current card is then this process's."""
    named: list[str] = []

    def load(*_: object, device: str, **__: object) -> nn.Module:
        named.append(device)
        choose_device(device, Machine(torch.__version__, "CUDA", True, ("a", "b")), local_rank=1, processes=count)
        return nn.Module()

    monkeypatch.setattr(contrast.Embedder, "load", load)
    monkeypatch.setattr(contrast, "processes", lambda: count)
    embedder = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:1"))
    contrast._guide(embedder, Contrast(mask_above=0.0, guide="guide"))  # type: ignore[arg-type]
    assert named == [name]


def test_the_loss_is_compiled_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first card, which others may fill, and not in bfloat16, which older cards do not have."""
    tried: list[tuple[str, torch.dtype]] = []

    def compiled(products: Tensor, *_: object) -> None:
        tried.append((products.device.type, products.dtype))

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    for dtype in (torch.float32, torch.bfloat16):
        reconstruction._compiled_softmax(torch.device("meta"), dtype)
    assert tried == [("meta", torch.float32), ("meta", torch.bfloat16)]


# --- Devices ---------------------------------------------------------------------------------------------------------


def onto(thing: Any, mode: FakeTensorMode, device: str) -> Any:
    """A batch without values, on a device: all but what `PackedBatch` keeps on the CPU."""
    if isinstance(thing, Tensor):
        with mode:
            return mode.from_tensor(thing).to(device)
    if isinstance(thing, PackedBatch):
        moved = {field.name: onto(getattr(thing, field.name), mode, device) for field in fields(thing)}
        return PackedBatch(**moved | {"offsets": mode.from_tensor(thing.offsets)})
    if is_dataclass(thing) and not isinstance(thing, type | TextPair | TokenPair):
        return replace(thing, **{field.name: onto(getattr(thing, field.name), mode, device) for field in fields(thing)})
    return [onto(part, mode, device) for part in thing] if isinstance(thing, list) else thing


def weights_onto(module: nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Weights and buffers without values, on a device; those that are tied stay so."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in made:
                    moved = onto(tensor.detach(), mode, device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_weight else moved
                store[name] = None if tensor is None else made[id(tensor)]  # type: ignore[assignment]


def leaves_of(output: Tensor) -> list[Tensor]:
    """Tensors that a backward pass would fill gradients into."""
    found, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            nodes += [following for following, _ in node.next_functions]
    return found


def filled(output: Tensor, slope: Tensor | None = None) -> None:
    """What stands in for a backward pass: gradients of the right shape and device in all leaves."""
    assert slope is None or (slope.device, slope.shape) == (output.device, output.shape)
    leaves = leaves_of(output)
    assert leaves
    for leaf in leaves:
        leaf.grad = torch.empty_like(leaf)


def gradients_of(output: Tensor, inputs: Tensor, slope: Tensor | None = None) -> tuple[Tensor]:
    assert slope is None or (slope.device, slope.shape) == (output.device, output.shape)
    assert any(leaf is inputs for leaf in leaves_of(output))
    return (torch.empty_like(inputs),)


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors with a device and no values; what asks a driver for a card is left out."""
    monkeypatch.setattr(gradcache, "_random_state", lambda _: None)
    monkeypatch.setattr(gradcache, "_set_random_state", lambda *_: None)
    monkeypatch.setattr(reconstruction, "_compiled_softmax", lambda *_: reconstruction._softmax)
    monkeypatch.setattr(Tensor, "backward", filled)
    monkeypatch.setattr(torch.autograd, "backward", filled)
    monkeypatch.setattr(torch.autograd, "grad", gradients_of)
    return FakeTensorMode()


needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
no_autocast = pytest.mark.filterwarnings("ignore:CUDA is not available")


@needs_cuda_build
@no_autocast
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "granite"])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_mixes_no_devices(name: str, architecture: str, without_values: FakeTensorMode) -> None:
    module, run, pairs = stage(STAGES[name], architecture)
    batch = run.make_batch(0, pairs)
    weights_onto(module, without_values, "cuda")
    with without_values:
        measured = run.run(onto(batch, without_values, "cuda"))
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
    assert {value.device.type for value in [*measured.values(), norm]} == {"cuda"}
    assert all(weight.grad is not None and weight.grad.device.type == "cuda" for weight in trained)


@needs_cuda_build
@no_autocast
@pytest.mark.parametrize("name", ["both directions, bags", "centred", "contrastive, all options"])
def test_a_number_left_on_the_cpu_is_seen(
    name: str, without_values: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PackedBatch.__init__

    def forgetful(self: PackedBatch, **parts: Any) -> None:
        right(self, **parts | {"positions": torch.zeros(parts["positions"].shape, dtype=torch.long)})

    module, run, pairs = stage(STAGES[name])
    batch = run.make_batch(0, pairs)
    weights_onto(module, without_values, "cuda")
    with without_values:
        monkeypatch.setattr(PackedBatch, "__init__", forgetful)
        moved = onto(batch, without_values, "cuda")
        with pytest.raises(RuntimeError, match=r"two different devices|same device"):
            run.run(moved)


def test_what_is_prepared_goes_to_the_device_but_for_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the meta device, which every build of torch has."""
    for settings in (STAGES["both directions, bags"], STAGES["contrastive, all options"]):
        _, run, pairs = stage(settings)
        monkeypatch.setattr(type(run), "device", torch.device("meta"))
        places = set(tensors_of(run.make_batch(0, pairs)))
        assert {place for name, place in places if name == "offsets"} == {"cpu"}
        assert {place for name, place in places if name != "offsets"} == {"meta"}


def tensors_of(thing: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and device of each tensor of a batch."""
    if isinstance(thing, Tensor):
        yield name, thing.device.type
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from tensors_of(getattr(thing, field.name), field.name)
    elif isinstance(thing, list):
        for part in thing:
            yield from tensors_of(part, name)
