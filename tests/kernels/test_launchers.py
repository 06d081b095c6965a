"""Launchers up to the launch: Triton binds their own arguments and compiles, no GPU takes part.

Ahead-of-time cases say what a launcher should ask for; this is what it does ask for, and how often.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.support import randn
from torch import Tensor

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a card is there, and its tests launch the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from arat_kernels.cosine_invariance import triton as cosine_invariance  # noqa: E402
from arat_kernels.crop_flip import triton as crop_flip  # noqa: E402
from arat_kernels.cross_entropy_grad import triton as cross_entropy_grad  # noqa: E402
from arat_kernels.frozen_affine import triton as frozen_affine  # noqa: E402
from arat_kernels.pgd_step import triton as pgd_step  # noqa: E402


class Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, each compiled instead of run, and inside a device guard."""
    names: list[str] = []
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

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert guarded, f"{self.fn.__name__} is launched on whatever device is the current one"
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        assert ".target sm_90" in compiled.asm["ptx"]
        names.append(self.fn.__name__)
        return compiled

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cosine_invariance._counters, "take", guarded_take)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return names


RNG = torch.tensor([1, 2])
# Sizes of 1 become constants of the kernel, which is where launchers break.
SHAPES = [(16, 3, 32, 32), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_step_is_one_launch(launches: list[str], shape: tuple[int, ...], norm: str) -> None:
    x = randn(shape, 0)
    pgd_step._launch_pgd_step(x.clone(), x.bfloat16(), x, 0.1, 1.0, norm)
    assert launches == [f"pgd_step_{norm.lower()}_kernel"]
    pgd_step._launch_random_start(x, RNG, 0.1, norm)
    assert launches[1:] == [f"random_start_{norm.lower()}_kernel"]


@pytest.mark.parametrize("widths", [(512,) * 4, (320,) + (640,) * 10, (1,), (5000, 3)], ids=str)
def test_cosine_invariance_is_one_launch_in_each_direction(
    launches: list[str], widths: tuple[int, ...]
) -> None:
    predictions = [randn((7, w), i) for i, w in enumerate(widths)]
    targets = [randn((7, w), i + 50) for i, w in enumerate(widths)]
    cosine_invariance._launch_forward(predictions, targets, 1e-8)
    assert launches == ["cosine_invariance_fwd_kernel"]
    cosine_invariance._launch_backward(randn((len(widths),), 99), predictions, targets, 1e-8)
    assert launches[1:] == ["cosine_invariance_bwd_kernel"]


def test_counters_of_graphs_are_distinct_and_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = cosine_invariance._Counters()
    made: list[weakref.ref[Tensor]] = []

    def zeros(sets: int, device: torch.device) -> Tensor:
        made.append(weakref.ref(tensor := torch.zeros(sets, counters.MOST_LAYERS).int()))
        return tensor

    monkeypatch.setattr(counters, "_zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    eager = counters.take(4, device)
    assert counters.take(4, device) is eager
    capturing = True
    sets = [counters.take(4, device) for _ in range(counters.CAPTURED_SETS + 2)]
    assert len({tensor.data_ptr() for tensor in (eager, *sets)}) == len(sets) + 1
    assert len(made) == 4
    del sets
    gc.collect()
    assert [reference() is not None for reference in made] == [True, True, False, False]


@pytest.mark.parametrize("shape", [(4, 64, 8, 8), *SHAPES], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frozen_affine_is_one_launch_in_each_direction(
    launches: list[str], shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = randn(shape, 0).bfloat16().to(memory_format=layout)
    scale = randn(shape[1:2], 1)
    for factor, residual in ((scale, x), (None, None)):
        launches.clear()
        frozen_affine._launch_forward(x, factor, scale, residual, True)
        assert launches == ["frozen_affine_fwd_kernel"]
        frozen_affine._launch_backward(x, None, x, factor, True, residual is not None)
        assert launches[1:] == ["frozen_affine_bwd_kernel"]
    frozen_affine._launch_backward(x, x, x, None, True, False)
    assert launches[2:] == ["frozen_affine_bwd_kernel"]


@pytest.mark.parametrize(
    ("dtype", "split"), [(torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_crop_flip_is_one_launch(launches: list[str], dtype: torch.dtype, split: bool) -> None:
    calls: list[tuple[Tensor | None, Tensor | None]] = [
        (RNG, None),
        (None, torch.zeros(1, 3, dtype=torch.int32)),
        (None, None),
    ]
    index = torch.zeros(1, dtype=torch.int64)
    for shape in ((5, 3, 32, 32), (1, 1, 1, 1)):
        images = torch.zeros(shape, dtype=torch.uint8)
        for rng, offsets in calls:
            launches.clear()
            crop_flip._launch(images, index, rng, offsets, 1, False, 1.0, dtype, True, split)
            assert launches == ["crop_flip_kernel"]


@pytest.mark.parametrize("shape", [(64, 10), (3, 5000), (1, 1)], ids=str)
def test_cross_entropy_grad_is_one_launch(launches: list[str], shape: tuple[int, int]) -> None:
    target = torch.zeros(shape[0], dtype=torch.int64)
    launch: Callable[..., Any] = cross_entropy_grad._launch
    launch(randn(shape, 0), target)
    assert launches == ["cross_entropy_grad_kernel"]
