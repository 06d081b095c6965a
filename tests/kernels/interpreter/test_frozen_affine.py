"""The affine kernels in Triton's interpreter, beside what all operations promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.operations import affine, assert_equal, relu
from kernels.support import few, randn

from arat_kernels.frozen_affine import relu_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FLAGS = list(product([True, False], repeat=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("scaled", "residual", "last"), FLAGS)
def test_against_the_float64_reference(
    dtype: torch.dtype, layout: torch.memory_format, scaled: bool, residual: bool, last: bool
) -> None:
    operation = affine(last, layout=layout, scaled=scaled, residual=residual)
    tensors = operation.make(0, dtype)
    operation.check(tensors)
    for result in operation.results(tensors, "triton").values():
        assert result.stride() == tensors["x"].stride()


@few(10)
@given(
    num=st.integers(0, 3),
    channels=st.sampled_from([1, 3, 16, 17, 48, 64, 100]),
    height=st.integers(1, 5),
    width=st.integers(1, 7),
    layout=st.sampled_from(LAYOUTS),
    flags=st.sampled_from(FLAGS),
)
def test_any_shape(
    num: int,
    channels: int,
    height: int,
    width: int,
    layout: torch.memory_format,
    flags: tuple[bool, bool, bool],
) -> None:
    shape = (num, channels, height, width)
    operation = affine(flags[0], shape=shape, layout=layout, scaled=flags[1], residual=flags[2])
    operation.check(operation.make(1, torch.float32))


@pytest.mark.parametrize("shape", [(5, 20), (4, 32, 9), (2, 16, 3, 3, 3)], ids=str)
def test_other_ranks(shape: tuple[int, ...]) -> None:
    operation = affine(shape=shape)
    operation.check(operation.make(2, torch.float32))


@pytest.mark.parametrize("constants", [torch.bfloat16, torch.float64], ids=str)
def test_constants_of_another_dtype(constants: torch.dtype) -> None:
    operation = affine()
    tensors = operation.make(3, torch.float16)
    other = tensors | {name: tensors[name].to(constants) for name in ("scale", "shift")}
    wide = tensors | {name: other[name].float() for name in ("scale", "shift")}
    assert_equal(operation.results(other, "triton"), operation.results(wide, "triton"))


@pytest.mark.parametrize("name", ["x", "residual"])
def test_only_what_is_asked_for_is_differentiated(name: str) -> None:
    operation = affine()
    tensors = operation.make(4, torch.float32)
    leaf = tensors[name].clone().requires_grad_()
    y = operation.call({**tensors, name: leaf}, "triton")
    assert isinstance(y, torch.Tensor)
    dy = randn(tuple(y.shape), 5)
    found = torch.autograd.grad(y, leaf, dy)
    expected = operation.call({**tensors, name: leaf}, "reference")
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 3, 7), (7, 9)], ids=str)
def test_relu_backward(dtype: torch.dtype, skip: bool, shape: tuple[int, ...]) -> None:
    operation = relu(shape=shape, skip=skip)
    tensors = operation.make(7, dtype)
    operation.check(tensors)
    assert 0.3 < (operation.results(tensors, "triton")["0"] == 0).float().mean() < 0.7


def test_relu_backward_is_what_autograd_computes_for_a_folded_convolution() -> None:
    """y feeds a further convolution and a skip connection; both of its inputs want a gradient."""
    a, residual = randn((2, 4, 6, 6), 0).requires_grad_(), randn((2, 8, 6, 6), 1).requires_grad_()
    weight, bias = randn((8, 4, 3, 3), 2), randn((8,), 3)
    next_weight = randn((8, 8, 3, 3), 4)
    dz, dy_skip = randn((2, 8, 6, 6), 5), randn((2, 8, 6, 6), 6)
    inner = torch.nn.functional.conv2d(a, weight, bias, padding=1)
    y = (inner + residual).relu()
    z = torch.nn.functional.conv2d(y, next_weight, padding=1)
    expected = torch.autograd.grad([z, y], [inner, residual], [dz, dy_skip])
    dy = torch.nn.grad.conv2d_input(y.shape, next_weight, dz, padding=1)
    got = relu_backward(dy, y.detach(), dy_skip=dy_skip, impl="triton")
    torch.testing.assert_close(got, expected[0])
    torch.testing.assert_close(got, expected[1])
