"""The affine kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernels.graphs import need_gib
from kernels.operations import Tensors, affine, assert_equal, relu
from kernels.support import EPS_OF, randn

from arat_kernels.frozen_affine import frozen_affine

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 64, 32, 32), (8, 512, 4, 4), (6, 640, 8, 8), (4, 160, 16, 16), (5, 3, 17, 5)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensors:
    """Sixteenths, and 0.03125 off them, so that no y is so near 0 that rounding decides what ReLU
    does."""
    made = affine(shape=shape, layout=layout).make(0, torch.float32)
    scale = made["scale"]
    made["scale"] = scale.sign() * (scale.abs() * 2).round().clamp(1, 4) / 2
    for name in ("x", "residual"):
        made[name] = ((made[name].clamp(-4, 4) * 8).round() / 8).to(dtype)
    made["shift"] = (made["shift"].clamp(-2, 2) * 8).round() / 8 + 0.03125
    return {name: t.to("cuda") for name, t in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    whole = case(shape, dtype, layout)
    for scaled, residual, last in product([True, False], repeat=3):
        kept = {"scale": scaled, "residual": residual}
        tensors = {name: t for name, t in whole.items() if kept.get(name, True)}
        affine(last).check(tensors)
        for result in affine(last).results(tensors, "triton").values():
            assert result.stride() == tensors["x"].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_backward_equals_the_reference(
    dtype: torch.dtype, skip: bool, shape: tuple[int, ...]
) -> None:
    operation = relu(shape=shape, skip=skip)
    tensors = {name: t.to("cuda") for name, t in operation.make(0, dtype).items()}
    got = operation.results(tensors, "triton")
    assert_equal(got, operation.results(tensors, "reference"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    need_gib(30)
    num, channels, size = 2**13 + 3, 64, 64
    x = torch.empty(
        num, channels, size, size, dtype=torch.bfloat16, device="cuda", memory_format=layout
    )
    assert x.numel() > 2**31
    numbers = torch.Generator("cuda").manual_seed(0)
    for part in x.split(2**8):
        part.normal_(generator=numbers)
    scale, shift = (randn((channels,), i).to("cuda") for i in range(2))
    x.requires_grad_()
    y = frozen_affine(x, scale, shift, impl="triton")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    last = slice(num - 2, num)
    tail = x.detach()[last].clone().requires_grad_()
    expected = frozen_affine(tail, scale, shift, impl="reference")
    # A multiply-add that rounds once may round to the next bfloat16, or move y by 1e-6 across 0.
    torch.testing.assert_close(y[last], expected, rtol=EPS_OF[torch.bfloat16], atol=1e-6)
    mask = (y[last] > 0).float()
    dexpected = x.detach()[last].float() * mask * scale.view(-1, 1, 1)
    rounding = EPS_OF[torch.bfloat16] / 2
    torch.testing.assert_close(dx[last].float(), dexpected, rtol=rounding, atol=0)
    assert 0.2 < mask.mean() < 0.8
