"""The affine map with residual and ReLU, and its backward, against PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_kernels.frozen_affine import frozen_affine, relu_backward

# (N, C, H, W): stages of ResNet-18 and WRN-34-10 on 32x32 images.
SHAPES = [(512, 64, 32, 32), (512, 128, 16, 16), (512, 512, 4, 4), (256, 160, 32, 32)]
BYTES_PER_GRAPH = 2e9


def inputs(shape: tuple[int, int, int, int], tensors: int) -> list[list[Tensor]]:
    """bf16 channels_last tensors, together far over the L2 cache."""
    numbers = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        value = torch.randn(shape, generator=numbers, device="cuda").bfloat16()
        return value.contiguous(memory_format=torch.channels_last)

    elements = shape[0] * shape[1] * shape[2] * shape[3]
    number = max(2, round(BYTES_PER_GRAPH / (2 * tensors * elements)))
    return [[draw() for _ in range(tensors)] for _ in range(number)]


def check(contestants: dict[str, list[Any]]) -> None:
    expected = contestants["PyTorch eager"][0]()
    for name, calls in contestants.items():
        for got, value in zip(as_list(calls[0]()), as_list(expected), strict=True):
            error = (got.float() - value.float()).abs().mean() / value.float().abs().mean()
            assert error < 0.02, f"{name} is off by {error:.1%}: its time would mean nothing"


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_affine(
    compare: Callable[..., None], shape: tuple[int, int, int, int], backward: bool
) -> None:
    given = inputs(shape, 3)
    numbers = torch.Generator("cuda").manual_seed(1)
    scale, shift = (torch.randn(shape[1], generator=numbers, device="cuda") for _ in range(2))

    def ours(x: Tensor, residual: Tensor) -> Tensor:
        return frozen_affine(x, scale, shift, residual=residual)

    def eager(x: Tensor, residual: Tensor) -> Tensor:
        narrow = (t.to(x.dtype).view(-1, 1, 1) for t in (scale, shift))
        factor, offset = narrow
        return (x * factor + offset + residual).relu()

    def calls(function: Callable[..., Tensor]) -> list[Any]:
        if not backward:
            return [lambda t=t: function(t[0], t[1]) for t in given]
        return [lambda t=t: torch.autograd.grad(function(t[0], t[1]), t[:2], t[2]) for t in given]

    for x, residual, _ in given:
        x.requires_grad_(backward)
        residual.requires_grad_(backward)
    torch._dynamo.reset()
    contestants = {
        "frozen_affine": calls(ours),
        "PyTorch eager": calls(eager),
        "torch.compile": calls(torch.compile(eager, fullgraph=True)),
    }
    check(contestants)
    # Forward: x, residual, y; backward: dy, y, dx, the residual's gradient.
    compare(contestants, given[0][0].numel() * 2 * (7 if backward else 3), "frozen_affine")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folded_backward(compare: Callable[..., None], shape: tuple[int, int, int, int]) -> None:
    """Two gradients of a block's output, added and masked."""
    given = inputs(shape, 3)

    def eager(dy: Tensor, y: Tensor, dy_skip: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(dy + dy_skip, y, 0)

    for _, y, _ in given:
        y.relu_()
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True)
    contestants: dict[str, list[Any]] = {
        "relu_backward": [lambda t=t: relu_backward(t[0], t[1], dy_skip=t[2]) for t in given],
        "PyTorch eager": [lambda t=t: eager(*t) for t in given],
        "torch.compile": [lambda t=t: compiled(*t) for t in given],
    }
    check(contestants)
    compare(contestants, given[0][0].numel() * 2 * 4, "frozen_affine")
