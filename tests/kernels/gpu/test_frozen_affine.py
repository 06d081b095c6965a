"""The affine kernels on real hardware."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernels.graphs import capture, need_gib, on_side_stream
from kernels.support import EPS_OF, assert_within_budget, at_an_odd_place, randn, to_float64
from torch import Tensor

from arat_kernels.frozen_affine import frozen_affine, relu_backward

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 64, 32, 32), (8, 512, 4, 4), (6, 640, 8, 8), (4, 160, 16, 16), (5, 3, 17, 5)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, scale, shift, residual and the gradient of y; sixteenths, and 0.03125 off them, so that
    no y is so near 0 that rounding decides what ReLU does."""
    x, residual, dy = (randn(shape, seed + i) for i in range(3))
    scale, shift = (randn(shape[1:2], seed + 3 + i) for i in range(2))
    scale = scale.sign() * (scale.abs() * 2).round().clamp(1, 4) / 2
    x, residual = ((t.clamp(-4, 4) * 8).round() / 8 for t in (x, residual))
    shift = (shift.clamp(-2, 2) * 8).round() / 8 + 0.03125
    images = (t.to("cuda", dtype).to(memory_format=layout) for t in (x, residual, dy))
    x, residual, dy = images
    return x, scale.to("cuda"), shift.to("cuda"), residual, dy


def run(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    relu: bool,
    impl: str,
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    extra = leaves[1] if residual is not None else None
    y = frozen_affine(leaves[0], scale, shift, residual=extra, relu=relu, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    for with_scale, with_residual, relu in product([True, False], repeat=3):
        x, scale, shift, residual, dy = case(shape, dtype, layout)
        arguments = (x, scale if with_scale else None, shift, residual if with_residual else None)
        got = run(*arguments, dy, relu, "triton")
        baseline = run(*arguments, dy, relu, "reference")
        truth = run(*to_float64(arguments), dy.double(), relu, "reference")
        for i, (mine, theirs, exact) in enumerate(zip(got, baseline, truth, strict=True)):
            assert mine.stride() == x.stride()
            assert_within_budget(mine, exact, theirs, f"result {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_skip", [True, False])
def test_relu_backward_equals_the_reference(dtype: torch.dtype, with_skip: bool) -> None:
    for shape in SHAPES:
        dy, skip, y = (randn(shape, i, dtype).to("cuda") for i in range(3))
        y, extra = y.relu(), skip if with_skip else None
        got = relu_backward(dy, y, dy_skip=extra, impl="triton")
        assert torch.equal(got, relu_backward(dy, y, dy_skip=extra, impl="reference"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tensors_at_odd_places(layout: torch.memory_format) -> None:
    tensors = case(SHAPES[1], torch.bfloat16, layout)
    moved = [at_an_odd_place(t) for t in tensors]
    for relu in (True, False):
        expected = run(*tensors, relu, "triton")
        for got, value in zip(run(*moved, relu, "triton"), expected, strict=True):
            assert torch.equal(got, value)
    grad = relu_backward(tensors[4], tensors[0], dy_skip=tensors[3], impl="triton")
    again = relu_backward(moved[4], moved[0], dy_skip=moved[3], impl="triton")
    assert torch.equal(again, grad)


def test_graph_replay_with_changed_inputs() -> None:
    static = case(SHAPES[0], torch.bfloat16)
    graph, outputs = capture(lambda: run(*static, True, "triton"))
    for seed in (10, 20):
        fresh = case(SHAPES[0], torch.bfloat16, seed=seed)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        for got, expected in zip(outputs, run(*fresh, True, "triton"), strict=True):
            assert torch.equal(got, expected)


def test_side_stream() -> None:
    x, scale, shift, residual, _ = case(SHAPES[0], torch.bfloat16)
    expected = frozen_affine(x, scale, shift, residual=residual, impl="triton")
    got = on_side_stream(
        lambda late: frozen_affine(late, scale, shift, residual=residual, impl="triton"), x
    )
    assert torch.equal(got, expected)


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


def test_compiled_with_inductor_is_bit_identical() -> None:
    x, scale, shift, residual, dy = case(SHAPES[0], torch.bfloat16)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return frozen_affine(x, scale, shift, residual=residual, impl="triton")

    torch._dynamo.reset()
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
