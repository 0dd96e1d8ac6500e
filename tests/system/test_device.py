"""Which device and number format: decided by facts about the machine, which these tests give."""

import ast
import warnings
from pathlib import Path

import pytest
import torch

import anchorembed
from anchorembed.errors import InputError
from anchorembed.system import device as machine_device
from anchorembed.system.device import (
    Card,
    Machine,
    check_card,
    check_torch,
    choose_device,
    choose_dtype,
    compute_dtype,
    find_device,
    memory_of,
    seed_everything,
)

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "compute_90")
H100 = Card("NVIDIA H100", (9, 0), ARCHITECTURES, bfloat16=True)
T4 = Card("Tesla T4", (7, 5), ARCHITECTURES, bfloat16=False)
ONE = Machine("2.11.0+cu130", "CUDA 13.0", driver=True, gpus=("NVIDIA H100",))
TWO = Machine("2.11.0+cu130", "CUDA 13.0", driver=True, gpus=("NVIDIA H100", "NVIDIA A100"))
NONE = Machine("2.11.0+cpu", None, driver=False, gpus=())
CPU_BUILD = Machine("2.11.0+cpu", None, driver=True, gpus=())
OLD_DRIVER = Machine(
    "2.11.0+cu130", "CUDA 13.0", driver=True, gpus=(), fault="The NVIDIA driver on your system is too old."
)


@pytest.mark.parametrize(
    ("name", "machine", "device"),
    [
        ("auto", ONE, "cuda:0"),
        ("auto", NONE, "cpu"),
        ("cuda", ONE, "cuda"),
        ("cuda:1", TWO, "cuda:1"),
        ("cpu", CPU_BUILD, "cpu"),
    ],
)
def test_devices_that_are_there(name: str, machine: Machine, device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_device(name, machine) == torch.device(device)


def test_each_process_takes_its_own() -> None:
    assert choose_device("auto", TWO, local_rank=1, processes=2) == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"process 3 on this machine finds 2 GPUs.*one process per GPU"):
        choose_device("auto", TWO, local_rank=2, processes=3)


@pytest.mark.parametrize(
    ("name", "machine", "message"),
    [
        ("cuda:7", ONE, r"'cuda:7' asked for, but there is 1 GPU: cuda:0 \(NVIDIA H100\)\. Use one, or auto"),
        ("cuda:2", TWO, r"there is 2 GPUs: cuda:0 \(NVIDIA H100\), cuda:1 \(NVIDIA A100\)"),
        ("cuda", NONE, r"has no GPU that torch can see\. Use auto or cpu"),
        ("cuda", CPU_BUILD, r"torch 2\.11\.0\+cpu is built for CPUs only.*Install torch built for it"),
        (
            "cuda",
            OLD_DRIVER,
            r"for CUDA 13\.0, cannot use .*driver on your system is too old\. Update the driver",
        ),
        ("gpu", ONE, "not a device"),
        ("xpu", ONE, "not supported"),
        ("mps", ONE, "torch finds no Apple GPU"),
    ],
)
def test_devices_that_are_not(name: str, machine: Machine, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_device(name, machine)


def test_an_apple_gpu_is_used_if_asked_for() -> None:
    mac = Machine("2.11.0", None, driver=False, gpus=(), mps=True)
    assert choose_device("mps", mac) == torch.device("mps")
    assert choose_device("auto", mac) == torch.device("cpu")
    assert compute_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("machine", [CPU_BUILD, OLD_DRIVER])
def test_a_gpu_that_is_left_unused_is_said(machine: Machine) -> None:
    with pytest.warns(UserWarning, match=r"Running on the CPU: torch .*Or set model\.device=cpu"):
        assert choose_device("auto", machine) == torch.device("cpu")


@pytest.mark.parametrize("version", ["2.10.0", "1.13.1+cu117", "2.9.0a0+git123"])
def test_a_torch_that_is_too_old(version: str) -> None:
    with pytest.raises(InputError, match=r"is too old\. Install torch 2\.11 or newer"):
        check_torch(version)
    with pytest.raises(InputError, match="too old"):
        choose_device("cpu", Machine(version, None, driver=False, gpus=()))


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0", "unknown"])
def test_a_torch_that_is_not(version: str) -> None:
    check_torch(version)


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 0), False)]
)
def test_a_card_that_torch_has_code_for(capability: tuple[int, int], runs: bool) -> None:
    card = Card("card", capability, ARCHITECTURES, bfloat16=True)
    if runs:
        check_card(card)
    else:
        with pytest.raises(InputError, match=r"no code for card \(compute capability 7\.0\), only for sm_75"):
            check_card(card)


def test_a_card_that_is_too_new_for_torch() -> None:
    with pytest.raises(InputError, match=r"compute capability 12\.0"):
        check_card(Card("new", (12, 0), ("sm_80", "sm_90a"), bfloat16=True))
    check_card(Card("other maker", (9, 4), ("gfx942",), bfloat16=True))


def test_products_on_cards_with_and_without_bfloat16() -> None:
    assert choose_dtype("auto", "float32", H100) == torch.bfloat16
    assert choose_dtype("float32", "float32", H100) == torch.float32
    assert choose_dtype("auto", "nf4", H100) == torch.bfloat16
    with pytest.warns(UserWarning, match=r"Tesla T4 \(compute capability 7\.5\) has no bfloat16: products are float32"):
        assert choose_dtype("auto", "float32", T4) == torch.float32
    with pytest.raises(InputError, match=r"model\.precision: bfloat16 .*Tesla T4.*Use auto"):
        choose_dtype("bfloat16", "float32", T4)
    with pytest.raises(InputError, match=r"model\.weights: nf4 .*Tesla T4.*Use float32"):
        choose_dtype("auto", "nf4", T4)
    for wrong in (("fp16", "float32"), ("auto", "int8")):
        with pytest.raises(InputError, match="is unknown"):
            choose_dtype(*wrong, H100)


@pytest.mark.parametrize("multiplies", [True, False])
def test_products_on_cpus(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_device, "_cpu_multiplies_bfloat16", lambda: multiplies)
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if multiplies else torch.float32)
    assert compute_dtype("bfloat16", cpu) == compute_dtype("auto", cpu, "bfloat16") == torch.bfloat16
    with pytest.raises(InputError, match=r"model\.precision: float32, but products with bfloat16 weights"):
        compute_dtype("float32", cpu, "bfloat16")


@pytest.mark.slow
def test_what_windows_lacks_is_not_imported_with_a_module() -> None:
    modules = [*Path(anchorembed.__file__).parent.rglob("*.py")]
    at_top = [node for path in modules for node in ast.parse(path.read_text(encoding="utf-8")).body]
    imported = {alias.name for node in at_top if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in imported
    assert not imported & {"fcntl", "resource", "grp", "pwd", "termios"}


def test_this_machine() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert memory_of(torch.device("cpu")) > 2**28


def test_any_whole_number_is_a_seed() -> None:
    for seed in (0, 2**64, 10**30):
        seed_everything(seed)
        first = torch.rand(2)
        seed_everything(seed)
        assert torch.equal(torch.rand(2), first)
