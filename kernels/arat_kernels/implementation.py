"""Which implementation of an operation runs: chosen explicitly, never by falling back."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["triton", "reference"]

# What the kernels of floating-point tensors read and write.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Triton decides at import whether kernels are interpreted; read at import for the same reason.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on any device."""
    return _INTERPRETING


def warps(num_warps: int) -> int:
    """Warps to launch for ``num_warps`` warps of 32 threads: half as many where a warp has 64."""
    return num_warps if torch.version.hip is None else max(1, num_warps // 2)


def choose(impl: Impl | None, *tensors: Tensor | None) -> Impl:
    """Decide which implementation runs on ``tensors``.

    Args:
        impl: "triton", "reference", or None: Triton for CUDA tensors, the reference otherwise.
        tensors: every tensor of the call, of any shape and dtype; None is skipped.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: ``impl`` is unknown, the tensors are on more than one device, or "triton" is
            asked for where it cannot run (no triton installed; CPU tensors outside the
            interpreter).
    """
    if impl not in (None, "triton", "reference"):
        raise ValueError(f'impl must be "triton", "reference" or None, got {impl!r}')
    devices = [tensor.device for tensor in tensors if tensor is not None]
    for device in devices[1:]:
        if device != devices[0]:
            raise ValueError(f"all tensors must be on one device, got {devices[0]} and {device}")
    on_cuda = bool(devices) and devices[0].type == "cuda"
    if impl is None:
        impl = "triton" if on_cuda else "reference"
    if impl == "triton":
        if not _HAS_TRITON:
            raise ValueError(
                'impl="triton" needs the triton package, which is not installed; '
                'install it or pass impl="reference"'
            )
        if not on_cuda and not (_INTERPRETING and devices and devices[0].type == "cpu"):
            got = str(devices[0]) if devices else "no tensor"
            raise ValueError(
                f'impl="triton" expects CUDA tensors, got {got}; pass impl="reference", or set '
                "TRITON_INTERPRET=1 before the first import to run the kernels on the CPU"
            )
    return impl
