"""Launchers up to the launch: how often they launch what; no GPU takes part."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from kernels.aot.launches import recorded  # noqa: E402
from kernels.aot.operations import RNG, normalize  # noqa: E402

from arat_kernels.arrivals import Counters  # noqa: E402
from arat_kernels.cosine_invariance import triton as cosine_invariance  # noqa: E402
from arat_kernels.crop_flip import triton as crop_flip  # noqa: E402
from arat_kernels.cross_entropy_grad import triton as cross_entropy_grad  # noqa: E402
from arat_kernels.frozen_affine import triton as frozen_affine  # noqa: E402
from arat_kernels.image_parts import triton as image_parts  # noqa: E402
from arat_kernels.pgd_step import triton as pgd_step  # noqa: E402
from arat_kernels.split_batch_norm import triton as split_batch_norm  # noqa: E402

X = torch.zeros(4, 32, 8, 8)
ROW = torch.zeros(32)
INDEX = torch.zeros(4, dtype=torch.int64)
LAYERS = [X[0, 0]] * 11

ONE_LAUNCH: dict[str, Callable[[], object]] = {
    "pgd_step_linf_kernel": lambda: pgd_step.step(X, X.bfloat16(), X, None, 0.1, 1.0, "Linf"),
    "pgd_step_l2_kernel": lambda: pgd_step.step(X, X, X, None, 0.1, 1.0, "L2"),
    "pgd_step_l1_kernel": lambda: pgd_step.step(X, X, X, None, 0.1, 1.0, "L1"),
    "random_start_linf_kernel": lambda: pgd_step.start(X, RNG, 0.1, "Linf", 0),
    "random_start_radial_kernel": lambda: pgd_step.start(X, RNG, 0.1, "L1", 0),
    "cosine_invariance_fwd_kernel": lambda: cosine_invariance.forward(
        [X[0, 0]] * 11, [X[0, 0]] * 11, 1e-8
    ),
    "cosine_invariance_bwd_kernel": lambda: cosine_invariance.backward(
        ROW[:11], LAYERS, LAYERS, 1e-8
    ),
    "frozen_affine_fwd_kernel": lambda: frozen_affine.forward(X, ROW, ROW, X, True, X, True),
    "frozen_affine_bwd_kernel": lambda: frozen_affine.backward(X, X, X, X, ROW, True, True),
    "image_parts_fwd_kernel": lambda: image_parts.forward(X),
    "crop_flip_kernel": lambda: crop_flip.forward(
        X.byte(), INDEX, RNG, None, 1, True, 1.0, torch.float32, True
    ),
    "cross_entropy_grad_kernel": lambda: cross_entropy_grad.forward(X[0, 0, :4], INDEX),
    "cross_entropy_grad_weighted_kernel": lambda: cross_entropy_grad.forward_weighted(
        X[0, 0], X[0, 0]
    ),
}


@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_an_operator_is_one_launch(kernel: str) -> None:
    with recorded() as launches:
        ONE_LAUNCH[kernel]()
    assert [launch.kernel for launch in launches] == [kernel]


STATISTICS, SUMS = "split_batch_norm_statistics_kernel", "split_batch_norm_bwd_sums_kernel"
FORWARD, INPUT = "split_batch_norm_fwd_kernel", "split_batch_norm_bwd_input_kernel"


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("training", "parameters", "expected"),
    [
        (True, True, [STATISTICS, FORWARD, SUMS, INPUT]),
        (True, False, [STATISTICS, FORWARD, SUMS, INPUT]),
        (False, True, [FORWARD, SUMS, INPUT]),
        # No gradient of the parameters is computed in the attack.
        (False, False, [FORWARD, INPUT]),
    ],
)
def test_kernels_of_split_batch_norm(
    residual: bool, training: bool, parameters: bool, expected: list[str]
) -> None:
    with recorded() as launches:
        normalize(64, torch.float32, residual=residual, training=training, parameters=parameters)
    assert [launch.kernel for launch in launches] == expected


def test_a_gradient_of_the_weight_alone_computes_none_of_the_input() -> None:
    x = X.to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(2, 32, requires_grad=True) for _ in range(2))
    rows = torch.zeros(2, 32), torch.ones(2, 32)
    with recorded() as launches:
        y, _ = split_batch_norm.split_batch_norm_triton(
            x, weight, bias, *rows, (2, 2), True, True, 0.1, 1e-5, None, True, False, None
        )
        torch.autograd.grad(y, weight, torch.zeros_like(y))
    assert [launch.kernel for launch in launches] == [STATISTICS, FORWARD, SUMS]


@pytest.mark.parametrize("differentiable", [True, False])
def test_bits_of_relu_are_stored_for_a_backward_only(differentiable: bool) -> None:
    with recorded() as launches:
        normalize(64, torch.float32, residual=True, differentiable=differentiable)
    (forward,) = (launch for launch in launches if launch.kernel == FORWARD)
    assert ("mask_ptr" in forward.types) is differentiable


@pytest.mark.parametrize(("layers", "expected"), [(11, [11]), (12, [11, 1]), (26, [11, 11, 4])])
def test_long_lists_of_layers_take_more_launches(layers: int, expected: list[int]) -> None:
    tensors = [torch.zeros(3, 16)] * layers
    with recorded() as launches:
        out = cosine_invariance.forward(tensors, tensors, 1e-8)
        gradients = cosine_invariance.backward(out, tensors, tensors, 1e-8)
    assert out.shape == (layers,) and len(gradients) == layers
    assert [launch.given["LAYERS"] for launch in launches] == 2 * expected


def test_counters_of_captures_in_several_threads_are_distinct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(dict[int, int]):
        """Time for another thread between a read and the write after it."""

        def get(self, *arguments: Any) -> Any:
            value = super().get(*arguments)
            time.sleep(1e-3)
            return value

    counters = Counters()
    counters.for_graphs[0] = [torch.zeros(counters.CHUNK)]
    counters.captured = Slow({0: 0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with ThreadPoolExecutor(8) as threads:
        sets = list(threads.map(counters.take, [torch.device("cuda", 0)] * 32, [3] * 32))
    assert {tensor.storage_offset() for tensor in sets} == set(range(0, 96, 3))


def test_counters_of_graphs_are_distinct_and_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    monkeypatch.setattr(counters, "CHUNK", 100)
    made: list[weakref.ref[Tensor]] = []
    threads: list[int] = []

    def zeros(size: int, device: torch.device) -> Tensor:
        made.append(weakref.ref(tensor := torch.zeros(size).int()))
        threads.append(threading.get_ident())
        return tensor

    monkeypatch.setattr(counters, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "Stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    eager = counters.take(device, 40)
    assert counters.take(device, 30) is eager
    capturing = True
    sets = [counters.take(device, 40) for _ in range(4)]
    capturing = False
    # More than half are taken: others are made before the next capture.
    assert counters.take(device, 40) is eager
    capturing = True
    sets.append(counters.take(device, 40))
    assert len({tensor.data_ptr() for tensor in (eager, *sets)}) == len(sets) + 1
    # Those that last are made where no pool of a graph takes the allocation, the others inside it.
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [False, False, True, True, False]
    del sets
    gc.collect()
    assert [reference() is not None for reference in made] == [True, True, False, False, True]
