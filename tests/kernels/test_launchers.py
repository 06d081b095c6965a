"""Launchers up to the launch: Triton binds their own arguments and compiles, no GPU takes part.

Ahead-of-time cases say what a launcher should ask for; this is what it does ask for, and how often.
Split BatchNorm's are in test_split_batch_norm_launches.py.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from kernels.support import at_an_odd_place, randn
from torch import Tensor

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a card is there, and its tests launch the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from kernels.launches import Launch, assert_promised, recorded  # noqa: E402

from arat_kernels.cosine_invariance import triton as cosine_invariance  # noqa: E402
from arat_kernels.crop_flip import triton as crop_flip  # noqa: E402
from arat_kernels.cross_entropy_grad import triton as cross_entropy_grad  # noqa: E402
from arat_kernels.frozen_affine import triton as frozen_affine  # noqa: E402
from arat_kernels.pgd_step import triton as pgd_step  # noqa: E402


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch since the start of the test, each compiled instead of run."""
    return recorded(monkeypatch, compiled=True)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """As ``launches``, and not even compiled."""
    return recorded(monkeypatch, compiled=False)


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


def at_places(t: Tensor) -> list[Tensor]:
    """``t``, and the same numbers not at a multiple of 16 bytes."""
    return [t, at_an_odd_place(t).requires_grad_(t.requires_grad)]


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RNG = torch.tensor([1, 2])
# Sizes of 1 become constants of the kernel, which is where launchers break.
SHAPES = [(16, 3, 32, 32), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_step_is_one_launch(launches: list[Launch], shape: tuple[int, ...], norm: str) -> None:
    x = randn(shape, 0)
    pgd_step._launch_pgd_step(x.clone(), x.bfloat16(), x, 0.1, 1.0, norm)
    assert names(launches) == [f"pgd_step_{norm.lower()}_kernel"]
    pgd_step._launch_random_start(x, RNG, 0.1, norm)
    assert names(launches)[1:] == [f"random_start_{norm.lower()}_kernel"]


@pytest.mark.parametrize("widths", [(512,) * 4, (320,) + (640,) * 10, (1,), (5000, 3)], ids=str)
def test_cosine_invariance_is_one_launch_in_each_direction(
    launches: list[Launch], widths: tuple[int, ...]
) -> None:
    predictions = [randn((7, w), i) for i, w in enumerate(widths)]
    targets = [randn((7, w), i + 50) for i, w in enumerate(widths)]
    cosine_invariance._launch_forward(predictions, targets, 1e-8)
    assert names(launches) == ["cosine_invariance_fwd_kernel"]
    cosine_invariance._launch_backward(randn((len(widths),), 99), predictions, targets, 1e-8)
    assert names(launches)[1:] == ["cosine_invariance_bwd_kernel"]


@pytest.mark.parametrize(("layers", "expected"), [(11, [11]), (12, [11, 1]), (26, [11, 11, 4])])
def test_long_lists_of_layers_take_more_launches(
    launches: list[Launch], layers: int, expected: list[int]
) -> None:
    predictions = [randn((3, 16), i) for i in range(layers)]
    targets = [randn((3, 16), i + 50) for i in range(layers)]
    out = cosine_invariance._launch_forward(predictions, targets, 1e-8)
    assert out.shape == (layers,)
    gradients = cosine_invariance._launch_backward(randn((layers,), 99), predictions, targets, 1e-8)
    assert len(gradients) == layers
    assert [launch.constants["LAYERS"] for launch in launches] == 2 * expected


def test_counters_of_captures_in_several_threads_are_distinct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(dict[int, int]):
        """Time for another thread between a read and the write after it."""

        def get(self, *arguments: Any) -> Any:
            value = super().get(*arguments)
            time.sleep(1e-3)
            return value

    counters = cosine_invariance._Counters()
    counters._for_graphs[0] = torch.zeros(counters.CAPTURED_SETS, counters.SIZE)
    counters._captured = Slow({0: 0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with ThreadPoolExecutor(8) as threads:
        sets = list(threads.map(counters.take, [torch.device("cuda", 0)] * 32))
    assert len({tensor.data_ptr() for tensor in sets}) == 32


def test_counters_of_graphs_are_distinct_and_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = cosine_invariance._Counters()
    made: list[weakref.ref[Tensor]] = []
    threads: list[int] = []

    def zeros(sets: int, device: torch.device) -> Tensor:
        made.append(weakref.ref(tensor := torch.zeros(sets, counters.SIZE).int()))
        threads.append(threading.get_ident())
        return tensor

    monkeypatch.setattr(counters, "_zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "Stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    eager = counters.take(device)
    assert counters.take(device) is eager
    capturing = True
    sets = [counters.take(device) for _ in range(counters.CAPTURED_SETS + 2)]
    assert len({tensor.data_ptr() for tensor in (eager, *sets)}) == len(sets) + 1
    # Those that last are made where no pool of a graph takes the allocation, the others inside it.
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [False, False, True, True]
    del sets
    gc.collect()
    assert [reference() is not None for reference in made] == [True, True, False, False]


@pytest.mark.parametrize("shape", [(4, 64, 8, 8), *SHAPES], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frozen_affine_is_one_launch_in_each_direction(
    launches: list[Launch], shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = randn(shape, 0).bfloat16().to(memory_format=layout)
    scale = randn(shape[1:2], 1)
    for factor, residual in ((scale, x), (None, None)):
        launches.clear()
        frozen_affine._launch_forward(x, factor, scale, residual, True)
        assert names(launches) == ["frozen_affine_fwd_kernel"]
        frozen_affine._launch_backward(x, None, x, factor, True, residual is not None)
        assert names(launches)[1:] == ["frozen_affine_bwd_kernel"]
    frozen_affine._launch_backward(x, x, x, None, True, False)
    assert names(launches)[2:] == ["frozen_affine_bwd_kernel"]


@pytest.mark.parametrize(
    ("dtype", "split"), [(torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_crop_flip_is_one_launch(launches: list[Launch], dtype: torch.dtype, split: bool) -> None:
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
            assert names(launches) == ["crop_flip_kernel"]


@pytest.mark.parametrize("shape", [(64, 10), (3, 5000), (1, 1)], ids=str)
def test_cross_entropy_grad_is_one_launch(launches: list[Launch], shape: tuple[int, int]) -> None:
    target = torch.zeros(shape[0], dtype=torch.int64)
    launch: Callable[..., Any] = cross_entropy_grad._launch
    launch(randn(shape, 0), target)
    assert names(launches) == ["cross_entropy_grad_kernel"]


def test_every_pgd_launch_is_compiled_ahead_of_time(bound: list[Launch]) -> None:
    shapes = [(3, 5), (1, 1), (2, 16), (2, 1000), (3, 4096), (2, 4097), (1, 16384), (1, 16400)]
    shapes += [(2, 3, 32, 32), (2, 3, 5, 7), (1, 3, 75, 75), (1, 20_001)]
    for shape, dtype, norm in product(shapes, FLOATS, ("Linf", "L2")):
        x, grad = randn(shape, 0), randn(shape, 1, dtype)
        if len(shape) == 4 and dtype == torch.bfloat16:
            x = x.to(memory_format=torch.channels_last)
        for image in at_places(x):
            for gradient in at_places(grad):
                pgd_step._launch_pgd_step(image, gradient, x, 0.1, 1.0, norm)
            for first in (0, 1, 16):
                pgd_step._launch_random_start(image, at_places(RNG)[1], 0.1, norm, first)
    assert len(set(names(bound))) == 4
    assert_promised(bound, pgd_step.aot_cases())


def test_every_cosine_launch_is_compiled_ahead_of_time(bound: list[Launch]) -> None:
    networks = [(1,), (16,), (100,), (128,), (129,), (512,), (1000,), (1024,), (1025,), (2048,)]
    networks += [(2000,), (2049,), (4096,), (7, 2048), (16, 5000)]
    networks += [(512,) * layers for layers in (2, 3, 4, 5, 10, 11, 12, 23)]
    networks += [(320,) + (640,) * 10, (7,) * 4, (100,) * 11, (4096,) * 4, (2049,) * 8]
    for widths, dtype, target_dtype in product(networks, FLOATS, FLOATS):
        if (dtype == torch.float64) != (target_dtype == torch.float64):
            continue  # Refused.
        predictions = [randn((3, w), i, dtype).requires_grad_() for i, w in enumerate(widths)]
        targets = [randn((3, w), i + 50, target_dtype) for i, w in enumerate(widths)]
        for first in at_places(predictions[0]):
            given = [first, *predictions[1:]]
            out = cosine_invariance.cosine_invariance_triton(given, targets, 1e-8)
            torch.autograd.grad(out, given, torch.zeros_like(out))
    assert len(set(names(bound))) == 2
    assert_promised(bound, cosine_invariance.aot_cases())


def test_every_affine_launch_is_compiled_ahead_of_time(bound: list[Launch]) -> None:
    shapes = [(2, 64, 4, 4), (2, 32, 3, 3), (3, 16, 8, 12), (2, 48, 7, 7), (2, 3, 5, 5), (4, 10)]
    shapes += [(2, 100, 1, 1), (1, 1, 1, 1), (2, 8, 8, 8), (2, 65, 3, 4)]
    flags = list(product([True, False], repeat=3))
    for shape, dtype, constant in product(shapes, FLOATS, FLOATS):
        images = [randn(shape, 0, dtype)]
        if len(shape) == 4:
            images.append(images[0].to(memory_format=torch.channels_last))
        scale, shift = (randn(shape[1:2], i, constant) for i in range(2))
        for image, (with_scale, residual, relu) in product(images, flags):
            x = at_places(image)[residual]
            factor = at_places(scale)[relu] if with_scale else None
            extra = image if residual else None
            frozen_affine._launch_forward(x, factor, shift, extra, relu)
            y = x if relu else None
            for dx in (True, False):
                if factor is not None and (dx or residual):
                    frozen_affine._launch_backward(image, None, y, factor, dx, residual)
            frozen_affine._launch_backward(image, extra, image, None, True, False)
    assert len(set(names(bound))) == 2
    assert_promised(bound, frozen_affine.aot_cases())


def test_every_crop_launch_is_compiled_ahead_of_time(bound: list[Launch]) -> None:
    for channels, size in product((1, 3), (1, 7, 28, 32)):
        stored = torch.zeros(5, channels, size, size + 1, dtype=torch.uint8)
        views = [*at_places(stored), stored[..., :size], stored.transpose(2, 3)]
        outputs = [(d, c, False) for d, c in product(FLOATS[:3], (True, False))]
        outputs.append((torch.bfloat16, True, True))
        for images, index_dtype, output in product(views, (torch.int32, torch.int64), outputs):
            index = at_places(torch.zeros(3, dtype=index_dtype))[channels > 1]
            offsets = torch.zeros(3, 3, dtype=torch.int32)
            for rng, given, flip in (
                (RNG, None, True),
                (at_places(RNG)[1], None, False),
                (None, at_places(offsets)[1], False),
                (None, None, False),
            ):
                crop_flip._launch(images, index, rng, given, 1, flip, 1.0, *output)
    assert_promised(bound, crop_flip.aot_cases())


def test_every_cross_entropy_launch_is_compiled_ahead_of_time(bound: list[Launch]) -> None:
    sizes = [1, 2, 10, 16, 64, 100, 128, 200, 1000, 1024, 1025, 4000, 4096, 4097, 8192]
    for num_classes, dtype, kind in product(sizes, FLOATS, (torch.int64, torch.int32)):
        logits = randn((3, num_classes), 0, dtype)
        target = at_places(torch.zeros(3, dtype=kind))
        wider = randn((3, num_classes + 1), 0, dtype)
        for given in (*at_places(logits), wider[:, :-1], wider[:, 1:], logits[:1].expand(3, -1)):
            for place in target:
                cross_entropy_grad._launch(given, place)
    assert_promised(bound, cross_entropy_grad.aot_cases())


def test_a_launch_that_no_case_covers_is_seen(bound: list[Launch]) -> None:
    cross_entropy_grad._launch(randn((3, 1000), 0), torch.zeros(3, dtype=torch.int64))
    cases = cross_entropy_grad.aot_cases()
    assert_promised(bound, cases)
    without = [case for case in cases if "1024" not in case.name or "odd" not in case.name]
    with pytest.raises(AssertionError, match="no case does all of this"):
        assert_promised(bound, without)
    without = [case for case in cases if "fp32" not in case.name]
    with pytest.raises(AssertionError, match="no case has these types"):
        assert_promised(bound, without)
