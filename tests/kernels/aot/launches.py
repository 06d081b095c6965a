"""Launches on a machine without a card: what a launcher asks Triton for, and which of them do all
that others do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from arat_kernels.arrivals import counters


@dataclass(frozen=True, eq=False)
class Launch:
    """What is compiled for a launch, in the words of ``triton.compiler.ASTSource``.

    Args:
        function: the ``@triton.jit`` function.
        signature: type of every argument; "constexpr" for those that are compiled in.
        constants: their values, by path; None for a missing tensor.
        attributes: what Triton may assume, by path: that a pointer is a multiple of 16.
        num_warps: of a program.
        num_stages: of its loops, where they do not say themselves.
        fuses: whether a product and a sum are rounded once.
        maxnreg: registers a thread may have; None: the compiler's choice.
        cooperative: whether all programs are resident at once, or the launch fails.
    """

    function: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    fuses: bool = True
    maxnreg: int | None = None
    cooperative: bool = False

    @property
    def kernel(self) -> str:
        return str(self.function.fn.__name__)

    @cached_property
    def types(self) -> dict[str, Any]:
        """Of the arguments that are passed, in Triton's words; a tuple for a tuple."""
        return {name: kind for name, kind in self.signature.items() if kind != "constexpr"}

    @cached_property
    def given(self) -> dict[str, Any]:
        """Constants by name, missing tensors left out."""
        names = self.function.arg_names
        return {names[p[0]]: value for p, value in self.constants.items() if value is not None}

    @cached_property
    def divisible(self) -> frozenset[str]:
        """Arguments taken for multiples of 16; a tuple where all its elements are."""
        said = {path for path, attributes in self.attributes.items() if attributes}
        return frozenset(name for name in self.types if self._paths(name) <= said)

    def _paths(self, name: str) -> set[tuple[int, ...]]:
        index = self.function.arg_names.index(name)
        kind = self.types[name]
        return {(index, i) for i in range(len(kind))} if isinstance(kind, tuple) else {(index,)}

    def dtypes(self, name: str) -> frozenset[str]:
        """Types of an argument or of the elements of a tuple; none if it is missing."""
        kind = self.types.get(name, ())
        return frozenset(kind if isinstance(kind, tuple) else (kind,))

    @cached_property
    def label(self) -> str:
        """Unique among launches."""
        pointers = {
            name: "/".join(sorted(self.dtypes(name))).replace("*", "")
            for name in self.types
            if any(kind.startswith("*") for kind in self.dtypes(name))
        }
        told = [f"{name.removesuffix('_ptr')} {kind}" for name, kind in pointers.items()]
        told += [f"{name} {value}" for name, value in self.given.items()]
        narrow = sorted(pointers.keys() - self.divisible)
        told += [f"any {name}" for name in narrow] + [f"{self.num_warps} warps"]
        return f"{self.kernel}[{', '.join(told)}]"

    def covers(self, other: Launch) -> bool:
        """Whether this does all that ``other`` does, in the same way: it has

        - the type of each of its arguments, and the same that are multiples of 16;
        - its constants, but for ``_EXAMPLES``, its number of warps and of stages;
        - every optional tensor and flag that it has. More of them is more work, save what
          ``_INSTEAD`` names. (Without ``counts_ptr`` a program converts one number instead of
          loading one, which counts as less.)

        Of float64, which is there for gradcheck, the types alone are asked.
        """
        if self.kernel != other.kernel or self.given.get("WIDE") != other.given.get("WIDE"):
            return False
        if any(self.dtypes(name) != other.dtypes(name) for name in other.types):
            return False
        if any("*fp64" in other.dtypes(name) for name in other.types):
            return True
        flag, tensor = _INSTEAD.get(other.kernel, ("", ""))
        instead = other.given.get(flag) and tensor not in other.types
        return (
            all(self.given.get(f) or not other.given.get(f) for f in _FLAGS)
            and not (instead and tensor in self.types)
            and not ("dy_skip_ptr" in other.types and self._few != other._few)
            and self.num_warps == other.num_warps
            and self.num_stages == other.num_stages
            and self._shape == other._shape
            and self.divisible & other.types.keys() == other.divisible
        )

    @property
    def _few(self) -> bool:
        """Whether the second gradient is of every second pixel, which lie elsewhere."""
        return "width" in self.types

    @cached_property
    def _shape(self) -> dict[str, Any]:
        return {k: v for k, v in self.given.items() if k not in (*_FLAGS, *_EXAMPLES)}


# Constants that say what is computed, as optional tensors do; the others say how.
_FLAGS = ("RELU", "FLIP")
# Where this flag is set, a launch without this tensor does the tensor's work in another way.
_INSTEAD = {
    "split_batch_norm_bwd_sums_kernel": ("RELU", "mask_ptr"),
    "split_batch_norm_bwd_input_kernel": ("RELU", "mask_ptr"),
    "split_batch_norm_bwd_one_pass_kernel": ("RELU", "mask_ptr"),
}
# What a data set or a network brings along, in any number.
_EXAMPLES = ("CHANNELS", "OUT_CHANNELS", "WIDTHS")


def maximal(launches: Iterable[Launch]) -> list[Launch]:
    """As few launches as cover all of them."""
    different = list({launch.label: launch for launch in launches}.values())
    kept: list[Launch] = []
    # Those with most tensors and flags first.
    for launch in sorted(
        different, key=lambda found: (-len(found.types), -sum(map(bool, found.given.values())))
    ):
        if not any(other.covers(launch) for other in kept):
            kept.append(launch)
    return kept


class _Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the context, none of which runs; each must be inside a device guard."""
    found: list[Launch] = []
    guarded: list[Tensor] = []
    take = counters.take

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    def guarded_take(device: torch.device, size: int) -> Tensor:
        assert guarded, "the counters are taken where another device may be the current one"
        return take(device, size)

    def bind(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert guarded, f"{self.fn.__name__} is launched on whatever device is the current one"
        assert len(grid) <= 3 and all(0 < size < 2**31 for size in grid)
        _, _, _, backend, binder = self.device_caches[0]
        values, specialization, _ = binder(*args, debug=False, **options)
        chosen, *source = self._pack_args(backend, options, values, specialization, options)
        how = chosen.num_warps, chosen.num_stages, chosen.enable_fp_fusion, chosen.maxnreg
        found.append(Launch(self, *source, *how, chosen.launch_cooperative_grid))

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "device_of", device_of))
        stack.enter_context(patch.object(counters, "take", guarded_take))
        stack.enter_context(patch.object(JITFunction, "run", bind))
        stack.enter_context(patch.object(driver, "_active", _Hopper()))
        yield found
