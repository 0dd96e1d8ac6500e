"""The machine: device, number format, random state, memory."""

import ctypes
import hashlib
import os
import platform
import random
import re
import sys
import warnings
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from anchorembed.errors import InputError, first_line

Precision = Literal["auto", "bfloat16", "float32"]
Weights = Literal["float32", "bfloat16", "nf4"]
_OLDEST_TORCH = (2, 11)
_COMPUTING_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT = 32 * 2**20  # bytes of an array whose memory is kept: glibc's maximum


@dataclass(frozen=True, slots=True)
class Machine:
    """The parts of a machine that decide whether work can run on a GPU.

    Attributes:
        torch: version of torch, such as ``2.11.0+cu130``.
        build: CUDA or ROCm version that torch is built for; None for a CPU build.
        driver: whether NVIDIA's driver offers a GPU to this process.
        gpus: names of the GPUs that torch finds.
        fault: torch's error if there is a GPU and torch finds none, else empty.
        mps: whether torch can use an Apple GPU.
    """

    torch: str
    build: str | None
    driver: bool
    gpus: tuple[str, ...]
    fault: str = ""
    mps: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: name, CUDA compute capability, architectures that torch has code for, whether it multiplies bfloat16."""

    name: str
    capability: tuple[int, int]
    architectures: tuple[str, ...]
    bfloat16: bool

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def find_device(name: str) -> torch.device:
    """Return the device named ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        InputError: if the machine has no such device, or torch cannot use it.
    """
    local_rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(name, _machine(), local_rank, processes)
    if device.type == "cuda":
        check_card(_card(device))
    return device


def choose_device(name: str, machine: Machine, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Return the device that ``name`` means on a given machine, as `find_device` does.

    Args:
        name: ``auto`` is the GPU numbered ``local_rank``. Without a GPU that torch can use it is the CPU, with a
            warning if the machine has a GPU.
        machine: its torch and its GPUs.
        local_rank: number of this process on the machine, from 0.
        processes: number of processes that train together, on all machines.

    Raises:
        InputError: if the machine has no such device, or torch is too old.
    """
    check_torch(machine.torch)
    if name == "auto":
        if local_rank >= len(machine.gpus) > 0:
            raise InputError(
                f"model.device: process {local_rank + 1} on this machine finds {_counted_gpus(machine)}. "
                "Start one process per GPU."
            )
        if not machine.gpus and machine.driver:
            warnings.warn(f"Running on the CPU: {_no_gpu(machine)} Or set model.device=cpu.", stacklevel=1)
        return torch.device("cuda", local_rank) if machine.gpus else torch.device("cpu")
    device = _parsed(name)
    if device.index is not None and processes > 1:
        raise InputError(f"model.device: {name!r} is one GPU for {processes} processes. Use auto: each takes its own.")
    if device.type == "mps" and not machine.mps:
        raise InputError(f"model.device: {name!r} asked for, but torch finds no Apple GPU. Use auto or cpu.")
    if device.type == "cuda" and not machine.gpus:
        use = "Or use" if machine.driver else "Use"
        raise InputError(f"model.device: {name!r} asked for, but {_no_gpu(machine)} {use} auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= len(machine.gpus):
        raise InputError(f"model.device: {name!r} asked for, but there is {_counted_gpus(machine)}. Use one, or auto.")
    return device


def _parsed(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device: {name!r} is not a device. Use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"model.device: {name!r} is not supported. Use auto, cpu, cuda, cuda:N or mps.")
    return device


def _counted_gpus(machine: Machine) -> str:
    """How many GPUs there are, and which, as part of a message."""
    named = ", ".join(f"cuda:{number} ({name})" for number, name in enumerate(machine.gpus))
    return f"{len(machine.gpus)} GPU{'s' if len(machine.gpus) > 1 else ''}: {named}"


def _no_gpu(machine: Machine) -> str:
    """Why torch finds no GPU, and what helps."""
    if not machine.driver:
        return "this machine has no GPU that torch can see."
    if machine.build is None:
        return f"torch {machine.torch} is built for CPUs only, and this machine has a GPU. Install torch built for it."
    return (
        f"torch {machine.torch}, built for {machine.build}, cannot use this machine's GPU: "
        f"{machine.fault or 'it finds none'} Update the driver, or install torch built for the driver's version."
    )


def check_torch(version: str) -> None:
    """Refuse a torch that is too old.

    Raises:
        InputError: if ``version`` is below 2.11.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = ".".join(map(str, _OLDEST_TORCH))
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_TORCH:
        raise InputError(f"torch {version} is too old. Install torch {oldest} or newer.")


def check_card(card: Card) -> None:
    """Refuse a GPU that is too new or too old for this build of torch.

    Raises:
        InputError: if torch's code for ``card.architectures`` does not run on the GPU.
    """
    compiled = [name for name in card.architectures if name.startswith(("sm_", "compute_"))]  # none of ROCm's
    if compiled and not any(_runs_on(name, card.capability) for name in compiled):
        raise InputError(
            f"model.device: torch {torch.__version__} has no code for {card}, only for {', '.join(compiled)}. "
            "Install a torch built for this GPU, or use model.device=cpu."
        )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU of this compute capability, (major, minor).

    Code for ``sm_80`` runs on 8.0 and later minor versions, code for ``compute_80`` on all later versions.
    """
    kind, _, digits = architecture.partition("_")
    major, minor = divmod(int("".join(filter(str.isdigit, digits))), 10)
    return (major, minor) <= capability and (kind == "compute" or major == capability[0])


# --- Number format ---------------------------------------------------------------------------------------------------


def compute_dtype(precision: Precision, device: torch.device, weights: Weights = "float32") -> torch.dtype:
    """Return the dtype of matrix products on a device; see `choose_dtype`. On an Apple GPU ``auto`` is float32."""
    if device.type == "mps" and precision == "auto" and weights == "float32":
        return torch.float32
    return choose_dtype(precision, weights, _card(device) if device.type == "cuda" else None)


def choose_dtype(precision: Precision, weights: Weights, card: Card | None) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the hardware supports it, unless ``precision`` is float32.

    On a GPU without bfloat16 it is float32, with a warning: the range of float16 is too small for gradients.

    Args:
        precision: the requested dtype, or ``auto``.
        weights: how the weights are stored; products with bfloat16 or 4-bit weights are bfloat16.
        card: the GPU, or None on the CPU.

    Raises:
        InputError: if ``precision`` or ``weights`` is unknown, they contradict each other, or the GPU has no bfloat16.
    """
    for name, value, known in (("precision", precision, Precision), ("weights", weights, Weights)):
        if value not in get_args(known):
            raise InputError(f"{name}: {value!r} is unknown. Use {', '.join(get_args(known))}.")
    if weights != "float32" and precision == "float32":
        raise InputError(f"model.precision: float32, but products with {weights} weights are bfloat16. Set it to auto.")
    required = weights != "float32" or precision == "bfloat16"
    if required and card is not None and not card.bfloat16:
        key, value, cure = ("precision", precision, "auto") if weights == "float32" else ("weights", weights, "float32")
        raise InputError(f"model.{key}: {value} asked for, but {card} has no bfloat16: that needs 8.0. Use {cure}.")
    if precision == "auto" and card is not None and not card.bfloat16:
        warnings.warn(
            f"{card} has no bfloat16: products are float32 and attention is in buckets, several times slower.",
            stacklevel=1,
        )
    supported = _cpu_multiplies_bfloat16() if card is None else card.bfloat16
    return torch.bfloat16 if required or (supported and precision == "auto") else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Run matrix products in ``dtype``; weights, sums, norms and losses stay float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# --- Random state and memory -----------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch for a step of a process, so that a resumed step draws the same numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def keep_memory() -> None:
    """Tell glibc not to return freed memory to the system: the next step asks for it again, and page faults are slow.

    It does nothing without glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: the GPU's or, for the CPU, main memory; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss begins at the parent's peak; VmHWM is of this process alone.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415 - Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(device: torch.device) -> int:
    """Return how many bytes this process can use: on a GPU what is free and what it holds, else main memory.

    Main memory is the machine's or, if less, the container's limit; 0 where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = []
    with suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # the container's; "max" if it has none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(limits, default=0)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide training's results to the last bit."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _COMPUTING_PACKAGES}


# --- Queries of torch and the system ---------------------------------------------------------------------------------


def _machine() -> Machine:
    """This machine, by torch and the operating system."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = not hidden and any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg"))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    with warnings.catch_warnings(action="ignore"):  # torch warns of a driver that is too old, and counts no GPU
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # device_count does not test the driver
        gpus = tuple(torch.cuda.get_device_name(number) for number in range(count))
        fault = _cuda_error() if driver and build and not gpus else ""
    return Machine(torch.__version__, build, driver, gpus, fault, torch.backends.mps.is_available())


def _cuda_error() -> str:
    """Torch's error as it starts CUDA; empty if there is none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return ""


def _card(device: torch.device) -> Card:
    capability = torch.cuda.get_device_capability(device)
    bfloat16 = torch.version.hip is not None or capability >= (8, 0)
    return Card(torch.cuda.get_device_name(device), capability, tuple(torch.cuda.get_arch_list()), bfloat16)


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
