"""The affine kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from arat_kernels.checks import Tensors, affine, assert_equal, on_gpu, relu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 64, 32, 32), (8, 512, 4, 4), (6, 640, 8, 8), (4, 160, 16, 16), (5, 3, 17, 5)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def affine_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensors:
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
    whole = affine_case(shape, dtype, layout)
    for scaled, residual, last in product([True, False], repeat=3):
        kept = {"scale": scaled, "residual": residual}
        tensors = {name: t for name, t in whole.items() if kept.get(name, True)}
        affine(last).check(tensors)
        for result in affine(last).results(tensors, "triton").values():
            assert result.stride() == tensors["x"].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skip", [True, False])
def test_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], skip: bool) -> None:
    operation = relu(shape=shape, skip=skip)
    tensors = on_gpu(operation, 0, dtype)
    assert_equal(operation.results(tensors, "triton"), operation.results(tensors, "reference"))
