"""Launches on a machine without a card: what a launcher asks Triton for, and whether an AOT case
promises it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from arat_kernels.aot import AotCase, divisible
from arat_kernels.cosine_invariance import triton as cosine_invariance


class Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """What is compiled for a launch.

    Args:
        kernel: its name.
        types: of the arguments, in Triton's words; a tuple for a tuple.
        constants: of the arguments that are compiled in; None for a missing tensor.
        num_warps: of a program.
        num_stages: of its loops, where they do not say themselves.
        divisible: arguments taken for multiples of 16.
    """

    kernel: str
    types: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: frozenset[str]


def recorded(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> list[Launch]:
    """The launches from here to the end of the test, each inside a device guard; they are compiled
    for a Hopper, or (which takes no time) only bound to the kernel's arguments."""
    found: list[Launch] = []
    guarded: list[Tensor] = []
    run, take = JITFunction.run, cosine_invariance._counters.take

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    def guarded_take(device: torch.device) -> Tensor:
        assert guarded, "the counters are taken where another device may be the current one"
        return take(device)

    def bind(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = self.fn.__name__
        assert guarded, f"{name} is launched on whatever device is the current one"
        assert len(grid) <= 3 and all(0 < size < 2**31 for size in grid)
        _, _, _, backend, binder = self.device_caches[0]
        values, specialization, _ = binder(*args, debug=False, **options)
        packed = self._pack_args(backend, options, values, specialization, options)
        chosen, signature, constants, attributes = packed
        found.append(
            Launch(
                name,
                {key: kind for key, kind in signature.items() if kind != "constexpr"},
                {self.arg_names[path[0]]: value for path, value in constants.items()},
                chosen.num_warps,
                chosen.num_stages,
                _named(self.arg_names, signature, [p for p, said in attributes.items() if said]),
            )
        )
        if compiled:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            assert ".target sm_90" in kernel.asm["ptx"]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cosine_invariance._counters, "take", guarded_take)
    monkeypatch.setattr(JITFunction, "run", bind)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found


def assert_promised(launches: Iterable[Launch], cases: list[AotCase]) -> None:
    """Every launch is covered by one of ``cases``, which do not compile every combination.

    A case of the kernel covers a launch if it has

    - the type of each of the launch's arguments, and those that are multiples of 16;
    - its constants, but for ``_EXAMPLES``;
    - its number of warps and of stages;
    - every optional tensor and flag that it has. More of them is more work than the launch's, save
      what ``_INSTEAD`` names. (Without ``counts_ptr`` a program converts one number instead of
      loading one, which counts as less.)

    Of float64, which is there for gradcheck, the types alone are asked.
    """
    promises: dict[str, list[Launch]] = {}
    for case in cases:
        promises.setdefault(case.kernel.fn.__name__, []).append(_promise(case))
    seen = []
    for launch in launches:
        if launch not in seen:
            seen.append(launch)
            typed = [p for p in promises[launch.kernel] if _has_types_of(p, launch)]
            assert typed, f"no case has these types: {launch}"
            if not any("*fp64" in _types(launch, name) for name in launch.types):
                covered = any(_does_all_of(promise, launch) for promise in typed)
                assert covered, f"no case does all of this: {launch}"


# Constants that say what is computed, as optional tensors do; the others say how.
_FLAGS = ("RELU", "FLIP")
# Where this flag is set, a launch without this tensor does the tensor's work in another way.
_INSTEAD = {
    "split_batch_norm_bwd_sums_kernel": ("RELU", "mask_ptr"),
    "split_batch_norm_bwd_input_kernel": ("RELU", "mask_ptr"),
}
# What a data set or a network brings along, in any number, and cases have examples of.
_EXAMPLES = ("CHANNELS", "OUT_CHANNELS", "WIDTHS")


def _promise(case: AotCase) -> Launch:
    return Launch(
        case.kernel.fn.__name__,
        dict(case.signature),
        dict(case.constexprs),
        case.num_warps,
        case.num_stages,
        _named(case.kernel.arg_names, case.signature, divisible(case)),
    )


def _named(
    arguments: list[str], signature: dict[str, Any], paths: list[tuple[int, ...]]
) -> frozenset[str]:
    """The arguments at ``paths``; a tuple where all its elements are."""
    named = set()
    for name, kind in signature.items():
        index = arguments.index(name)
        places = [(index, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(index,)]
        if all(place in paths for place in places):
            named.add(name)
    return frozenset(named)


def _types(launch: Launch, name: str) -> frozenset[str]:
    kind = launch.types.get(name, ())
    return frozenset(kind if isinstance(kind, tuple) else (kind,))


def _has_types_of(promise: Launch, launch: Launch) -> bool:
    return promise.constants.get("WIDE") == launch.constants.get("WIDE") and all(
        _types(promise, name) == _types(launch, name) for name in launch.types
    )


def _does_all_of(promise: Launch, launch: Launch) -> bool:
    def shape(of: Launch) -> dict[str, Any]:
        return {
            name: value
            for name, value in of.constants.items()
            if value is not None and name not in (*_FLAGS, *_EXAMPLES)
        }

    flag, tensor = _INSTEAD.get(launch.kernel, ("", ""))
    instead = launch.constants.get(flag) and tensor not in launch.types
    return (
        all(promise.constants.get(f) or not launch.constants.get(f) for f in _FLAGS)
        and not (instead and tensor in promise.types)
        and promise.num_warps == launch.num_warps
        and promise.num_stages == launch.num_stages
        and shape(promise) == shape(launch)
        and promise.divisible & launch.types.keys() == launch.divisible
    )
