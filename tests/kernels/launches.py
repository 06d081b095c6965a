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
        divisible: arguments taken for multiples of 16.
    """

    kernel: str
    types: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
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

    def guarded_take(layers: int, device: torch.device) -> Tensor:
        assert guarded, "the counters are taken where another device may be the current one"
        return take(layers, device)

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
    """Every launch is covered by ``cases``, which do not compile every combination.

    Covered means that cases of the kernel have

    - the launch's block, number of warps and divisible arguments, elements of its width in the bulk
      tensors (of the widest, where they differ), and every optional tensor and flag that it has:
      the launch does that or less. Not asked of float64, which is there for gradcheck;
    - the types of its bulk tensors;
    - the type of each of its other arguments.
    """
    promises: dict[str, list[tuple[Launch, AotCase]]] = {}
    for case in cases:
        promises.setdefault(case.kernel.fn.__name__, []).append((_promise(case), case))
    seen = []
    for launch in launches:
        if launch in seen:
            continue
        seen.append(launch)
        of_kernel = promises[launch.kernel]
        bulk = {name for _, case in of_kernel for name in case.bulk} & launch.types.keys()
        made = [promise for promise, _ in of_kernel]
        elements = {name: _types(launch, name) for name in sorted(bulk)}
        assert any(
            all(_types(promise, name) in (kind, frozenset()) for name, kind in elements.items())
            and promise.constants.get("WIDE") == launch.constants.get("WIDE")
            for promise in made
        ), f"no case has these elements {elements}: {launch}"
        for name in launch.types.keys() - bulk:
            kinds = [_types(promise, name) for promise in made]
            assert _types(launch, name) in kinds, f"no case has this {name}: {launch}"
        if not any("*fp64" in kinds for kinds in elements.values()):
            assert any(_does_all_of(promise, launch, bulk) for promise in made), (
                f"no case does all of this: {launch}"
            )


# Constants that say what is computed, as optional tensors do; the others say how.
_FLAGS = ("RELU", "FLIP")
# What a data set or a network brings along, in any number, and cases have examples of; and what
# goes with the types.
_EXAMPLES = ("CHANNELS", "OUT_CHANNELS", "LAYERS", "WIDTHS", "WIDE")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _promise(case: AotCase) -> Launch:
    named = _named(case.kernel.arg_names, case.signature, divisible(case))
    types, constants = dict(case.signature), dict(case.constexprs)
    return Launch(case.kernel.fn.__name__, types, constants, case.num_warps, named)


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


def _does_all_of(promise: Launch, launch: Launch, bulk: set[str]) -> bool:
    def shape(of: Launch) -> dict[str, Any]:
        return {
            name: value
            for name, value in of.constants.items()
            if value is not None and name not in (*_FLAGS, *_EXAMPLES)
        }

    def sizes(of: Launch) -> list[int]:
        return [_BYTES[kind[1:]] for name in sorted(bulk) for kind in _types(of, name)]

    return (
        launch.types.keys() <= promise.types.keys()
        and all(promise.constants.get(f) or not launch.constants.get(f) for f in _FLAGS)
        and promise.num_warps == launch.num_warps
        and shape(promise) == shape(launch)
        and sizes(promise) in (sizes(launch), [max(sizes(launch), default=0)] * len(bulk))
        and promise.divisible & launch.types.keys() == launch.divisible
    )
