"""What machine this is: device, number format, threads, memory. The only file that asks it."""

import ctypes
import hashlib
import os
import platform
import random
import resource
import sys
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from anchorembed.errors import InputError

Precision = Literal["auto", "bfloat16", "float32"]
_COMPUTING = ("torch", "transformers", "tokenizers", "peft", "accelerate")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT = 32 * 2**20  # bytes: the most that glibc takes; larger arrays are few in a step


def find_device(name: str) -> torch.device:
    """Return the device named ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: if the machine has no such device.
    """
    if name == "auto":
        own = int(os.environ.get("LOCAL_RANK", "0"))  # set by whatever starts several processes
        return torch.device("cuda", own) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device: {name!r} is not a device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"model.device: {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device.index is not None and processes > 1:
        raise InputError(f"model.device: {name!r} is one for {processes} processes. Use auto: each takes its own.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"model.device: {name!r} asked for, {count} GPUs found. Use 'auto' or 'cpu'.")
    return device


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: bfloat16 where the hardware multiplies it, unless told otherwise."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Run matrix products in ``dtype``; weights, sums, norms and losses stay float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def first_process() -> bool:
    """Whether this process is the first of several, or alone: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch for one step of one process, so that a resumed step draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def keep_memory() -> None:
    """Tell glibc to keep freed memory, which a training step asks for again at once, rather than fault it in again.

    Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process ever held: of the GPU's memory on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands a parent's peak on to ru_maxrss of its children; VmHWM is the process's own.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """What computes: Python and the libraries whose numbers training depends on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _COMPUTING}


def cache_folder() -> Path:
    """Where downloads and indexes are kept: ``$ANCHOREMBED_CACHE``, else the user's cache directory."""
    root = os.environ.get("ANCHOREMBED_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorembed"


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
