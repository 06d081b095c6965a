"""The device of a run, its arithmetic, and what is installed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

_ABSENT = ("Found no NVIDIA driver", "GPUs are available", "not compiled with CUDA")
"""What PyTorch says where there is no GPU to use, or this PyTorch is not built for one."""

_version = cache(metadata.version)


def count_gpus() -> int:
    """How many GPUs PyTorch can use.

    Raises:
        ValueError: there are some that it cannot, as with a driver that is too old.
    """
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        if any(text in str(error) for text in _ABSENT):
            return 0
        raise ValueError(
            f"the GPU cannot be used: {str(error).partition('. ')[0]}; this PyTorch is built for "
            f"CUDA {torch.version.cuda}: update the driver, or install PyTorch's wheels for a CUDA "
            "that it knows into this environment; the device cpu (--train.device cpu, --device "
            "cpu) does without"
        ) from error
    return torch.cuda.device_count()


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: not a device, or a GPU that is not there or cannot be used, as one that is older
            than those that this PyTorch is built for.
    """
    if name == "auto":
        name = "cuda" if count_gpus() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count_gpus():
        raise ValueError(f"no such GPU: got {name!r}, this machine has {count_gpus()}")
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list())
        if 10 * major + minor < oldest:
            raise ValueError(
                f"the GPU cannot be used: {torch.cuda.get_device_name(device)} has compute "
                f"capability {major}.{minor}, and this PyTorch is built for {oldest / 10} and "
                "newer: install PyTorch's wheels for an older CUDA into this environment; the "
                "device cpu (--train.device cpu, --device cpu) does without"
            )
    return device


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as far as the C library is glibc.

    glibc returns large blocks to the kernel, which clears every page again when the next activation
    needs one. How large follows the largest block that was freed, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD): here such a block is freed that nothing was ever written to.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(
    precision: Literal["auto", "float32", "bf16"], device: torch.device
) -> torch.dtype:
    """The dtype of activations: ``auto`` is bfloat16 where the device has such arithmetic."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return torch.bfloat16
    return torch.float32


def set_deterministic(deterministic: bool, device: torch.device) -> None:
    """Let a GPU compute the same bits from the same numbers, or as fast as it can."""
    # Shapes repeat, so that timing cuDNN's algorithms once pays; but timings choose otherwise each
    # time.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic:
        # Read when cuBLAS begins.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn TF32 off for matrix products and convolutions inside the context."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_algorithm_search() -> Iterator[None]:
    """No timing of cuDNN's algorithms inside the context, where shapes do not repeat."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe_device(device: torch.device) -> str:
    """Model name of the GPU or the CPU, with the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def versions() -> dict[str, str]:
    """Versions of what reads the data, computes and attacks, and of this package."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "scikit-learn", "triton", "torchvision", "pyautoattack", "arat-fast"):
        try:
            found[package] = _version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" if changed; None outside one."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
