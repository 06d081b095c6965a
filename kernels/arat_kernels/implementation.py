"""Which implementation of an operation runs: chosen explicitly, never by falling back."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

Impl = Literal["triton", "reference"]

# What the kernels of floating-point tensors read and write.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Triton decides at import whether kernels are interpreted; read at import for the same reason.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on any device."""
    return _INTERPRETING


def warps(num_warps: int) -> int:
    """Warps to launch for ``num_warps`` warps of 32 threads: half as many where a warp has 64."""
    return num_warps if torch.version.hip is None else max(1, num_warps // 2)


def registers(most: int) -> dict[str, int]:
    """Argument of a launch whose threads have at most so many registers; AMD's have no such."""
    return {"maxnreg": most} if torch.version.hip is None else {}


def wide_dtype(t: Tensor) -> torch.dtype:
    """What the kernels compute in for ``t``: float32, for a float64 tensor float64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


_replaced: frozenset[str] = frozenset()


def replace_operations(names: Iterable[str]) -> None:
    """Run the reference of these operations wherever Triton would be taken, in this process.

    Args:
        names: of functions, such as "pgd_step"; empty for none, as at first.
    """
    global _replaced
    _replaced = frozenset(names)


def is_replaced(operation: str) -> bool:
    """Whether :func:`replace_operations` has named it."""
    return operation in _replaced


Experiment = Literal["one_pass", "dependent_launch"]

_enabled: frozenset[Experiment] = frozenset()


@contextmanager
def experimental(*ways: Experiment) -> Iterator[None]:
    """Launch kernels in ways that no GPU has yet shown right and faster, in this process.

    What is captured or compiled inside keeps them. An inner context replaces an outer one.

    Args:
        ways: "one_pass", split BatchNorm in one launch each way instead of two, where channels are
            a multiple of 16 and registers hold the tensor, on NVIDIA's cards; "dependent_launch",
            of split BatchNorm and the frozen affine map, whose beginning overlaps with the end of
            the launch before.

    Raises:
        ValueError: an unknown way, on entry.
        RuntimeError: at a launch, by Triton or the driver, "dependent_launch" below compute
            capability 9.0 or on AMD's cards.
    """
    global _enabled
    if unknown := set(ways) - set(get_args(Experiment)):
        raise ValueError(f"expected some of {get_args(Experiment)}, got {sorted(unknown)}")
    before, _enabled = _enabled, frozenset(ways)
    try:
        yield
    finally:
        _enabled = before


def is_enabled(way: Experiment) -> bool:
    """Whether the process is inside of :func:`experimental` with this way."""
    return way in _enabled


def choose(impl: Impl | None, *tensors: Tensor | None, operation: str = "") -> Impl:
    """Decide which implementation runs on ``tensors``.

    Args:
        impl: "triton", "reference", or None: Triton for CUDA tensors where it is installed,
            the reference otherwise.
        tensors: every tensor of the call, of any shape and dtype, the first not None.
        operation: name of the function, for :func:`replace_operations`.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: ``impl`` is unknown, the tensors are on more than one device, or "triton" is
            asked for where it cannot run (no triton installed; CPU tensors outside the
            interpreter).
        RuntimeError: "triton" is asked for under forward-mode differentiation.
    """
    if impl not in (None, "triton", "reference"):
        raise ValueError(f'impl must be "triton", "reference" or None, got {impl!r}')
    assert tensors[0] is not None
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"all tensors must be on one device, got {device} and {tensor.device}")
    on_cuda = tensors[0].is_cuda
    if impl is None:
        impl = "triton" if on_cuda and HAS_TRITON else "reference"
    if impl == "reference" or is_replaced(operation):
        return "reference"
    if not HAS_TRITON:
        raise ValueError(
            'impl="triton" needs the triton package, which is not installed; '
            'install it or pass impl="reference"'
        )
    if not on_cuda and not (_INTERPRETING and device.type == "cpu"):
        raise ValueError(
            f'impl="triton" expects CUDA tensors, got {device}; pass impl="reference", or set '
            "TRITON_INTERPRET=1 before the first import to run the kernels on the CPU"
        )
    # An operator that knows nothing of tangents would drop them, and the derivative would be 0.
    for tensor in tensors:
        if tensor is not None and _tangent(tensor) is not None:
            raise RuntimeError(
                "the kernels have no forward-mode derivative (torch.func.jvp, "
                'torch.autograd.forward_ad); pass impl="reference"'
            )
    return impl


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def refuse_second_derivative(operator: CustomOpDef) -> None:
    """Let the operator of a backward pass raise where it is itself differentiated."""

    def refuse(ctx: Any, *upstream: Any) -> None:
        raise RuntimeError('the kernels have no second derivative; pass impl="reference"')

    operator.register_autograd(refuse)
