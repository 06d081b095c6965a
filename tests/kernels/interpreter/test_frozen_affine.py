"""The affine kernels in Triton's interpreter, against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import assert_within_budget, at_an_odd_place, few, randn, to_float64
from torch import Tensor

from arat_kernels.frozen_affine import frozen_affine, relu_backward
from arat_kernels.frozen_affine.triton import _backward_op, _forward_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FLAGS = list(itertools.product([True, False], repeat=3))


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "nhwc",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, scale, shift, residual and the gradient of y."""
    x, residual, dy = (
        randn(shape, seed + i, dtype).to(memory_format=FORMATS[layout]) for i in range(3)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, randn(shape[1:2], seed + 3, wide), randn(shape[1:2], seed + 4, wide), residual, dy


def run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    relu: bool,
    impl: str,
) -> dict[str, Tensor]:
    leaves = {"x": x.detach().requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    y = frozen_affine(
        leaves["x"], scale, shift, residual=leaves.get("residual"), relu=relu, impl=impl
    )
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("with_scale", "with_residual", "relu"), FLAGS)
def test_against_the_float64_reference(
    dtype: torch.dtype, layout: str, with_scale: bool, with_residual: bool, relu: bool
) -> None:
    x, scale, shift, residual, dy = case((3, 32, 5, 6), dtype, layout)
    arguments = (x, scale if with_scale else None, shift, residual if with_residual else None, dy)
    got = run(*arguments, relu=relu, impl="triton")
    baseline = run(*arguments, relu=relu, impl="reference")
    truth = run(*to_float64(arguments), relu=relu, impl="reference")
    for name in baseline:
        assert got[name].dtype == dtype
        assert got[name].stride() == x.stride()
        assert_within_budget(got[name], truth[name], baseline[name], name)


@few(10)
@given(
    num=st.integers(0, 3),
    channels=st.sampled_from([1, 3, 16, 17, 48, 64, 100]),
    height=st.integers(1, 5),
    width=st.integers(1, 7),
    layout=st.sampled_from(list(FORMATS)),
    flags=st.sampled_from(FLAGS),
)
def test_any_shape(
    num: int,
    channels: int,
    height: int,
    width: int,
    layout: str,
    flags: tuple[bool, bool, bool],
) -> None:
    x, scale, shift, residual, dy = case((num, channels, height, width), torch.float32, layout)
    arguments = (x, scale if flags[0] else None, shift, residual if flags[1] else None, dy)
    got = run(*arguments, relu=flags[2], impl="triton")
    expected = run(*arguments, relu=flags[2], impl="reference")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("shape", [(5, 20), (4, 32, 9), (2, 16, 3, 3, 3)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    x, residual, dy = (randn(shape, i) for i in range(3))
    scale, shift = randn(shape[1:2], 3), randn(shape[1:2], 4)
    got = run(x, scale, shift, residual, dy, relu=True, impl="triton")
    expected = run(x, scale, shift, residual, dy, relu=True, impl="reference")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_any_strides() -> None:
    x, scale, shift, residual, dy = case((4, 24, 6, 5))
    arguments = (
        x[:, ::2],
        scale[::2],
        shift.flip(0)[::2],
        residual[:, :1].expand(-1, 12, -1, -1),
        dy.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)[:, 12:],
    )
    got = run(*arguments, relu=True, impl="triton")
    expected = run(*arguments, relu=True, impl="reference")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("constants", [torch.bfloat16, torch.float64], ids=str)
def test_constants_of_another_dtype(constants: torch.dtype) -> None:
    x, scale, shift, residual, dy = case((2, 16, 3, 4), torch.float16)
    scale, shift = scale.to(constants), shift.to(constants)
    got = run(x, scale, shift, residual, dy, relu=True, impl="triton")
    expected = run(x, scale.float(), shift.float(), residual, dy, relu=True, impl="triton")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_tensors_at_odd_places(layout: str, relu: bool) -> None:
    tensors = case((2, 16, 3, 4), torch.bfloat16, layout)
    expected = run(*tensors, relu=relu, impl="triton")
    got = run(*map(at_an_odd_place, tensors), relu=relu, impl="triton")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    x, _, _, skip, dy = tensors
    for moved in range(3):
        arguments = [dy, x.relu(), skip]
        grad = relu_backward(arguments[0], arguments[1], dy_skip=arguments[2], impl="triton")
        arguments[moved] = at_an_odd_place(arguments[moved])
        again = relu_backward(arguments[0], arguments[1], dy_skip=arguments[2], impl="triton")
        assert torch.equal(again, grad)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_gradcheck(with_scale: bool, with_residual: bool, layout: str) -> None:
    x, scale, shift, residual, _ = case((2, 3, 1, 2), torch.float64, layout, seed=20)
    leaves = (x.requires_grad_(), residual.requires_grad_() if with_residual else None)

    def function(x: Tensor, residual: Tensor | None) -> Tensor:
        return frozen_affine(
            x, scale if with_scale else None, shift, residual=residual, impl="triton"
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, scale, shift, residual, dy = case((2, 16, 3, 3))
    for leaf in (x, residual):
        expected = run(x, scale, shift, residual, dy, relu=True, impl="reference")
        leaf = leaf.requires_grad_()
        y = frozen_affine(x, scale, shift, residual=residual, impl="triton")
        (got,) = torch.autograd.grad(y, leaf, dy)
        torch.testing.assert_close(got, expected["dx" if leaf is x else "dresidual"])
        leaf.requires_grad_(False)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nan_passes_as_in_torch_relu(impl: str) -> None:
    x, scale, shift, _, dy = case((2, 16, 3, 3))
    x[1, 2, 0, 1] = math.nan
    got = run(x, scale, shift, None, dy, relu=True, impl=impl)
    assert torch.equal(got["y"].isnan(), x.isnan())
    torch.testing.assert_close(got["dx"][1, 2, 0, 1], dy[1, 2, 0, 1] * scale[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_skip", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 4, 4), (3, 5, 3, 7), (7, 9)])
def test_relu_backward(dtype: torch.dtype, with_skip: bool, shape: tuple[int, ...]) -> None:
    dy, skip, y = randn(shape, 0, dtype), randn(shape, 1, dtype), randn(shape, 2, dtype).relu()
    arguments = (dy, y), {"dy_skip": skip if with_skip else None}
    got = relu_backward(*arguments[0], **arguments[1], impl="triton")
    baseline = relu_backward(*arguments[0], **arguments[1], impl="reference")
    truth = relu_backward(*to_float64(arguments[0]), **to_float64(arguments[1]), impl="reference")
    assert got.dtype == dtype
    assert_within_budget(got, truth, baseline)
    assert 0.3 < (got == 0).float().mean() < 0.7


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


@pytest.mark.parametrize(
    ("with_scale", "with_residual", "relu"), [(True, True, True), (False, False, False)]
)
def test_operators_pass_opcheck(with_scale: bool, with_residual: bool, relu: bool) -> None:
    x, scale, shift, residual, dy = case((2, 3, 4, 4))
    factors = scale if with_scale else None
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(
        _forward_op, (leaf, factors, shift, residual if with_residual else None, relu)
    )
    y = residual.relu() if relu else None
    torch.library.opcheck(_backward_op, (dy, None, y, factors, True, with_residual))


def test_compiles_to_one_graph() -> None:
    x, scale, shift, residual, dy = case((2, 16, 3, 3))

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return frozen_affine(x * 2, scale, shift, residual=residual, impl="triton") + 1

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    expected = run(2 * x, scale, shift, residual, dy, relu=True, impl="reference")
    torch.testing.assert_close(results[0][1], 2 * expected["dx"])
