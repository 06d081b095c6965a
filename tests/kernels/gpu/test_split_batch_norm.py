"""Split BatchNorm's kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernels.graphs import need_gib
from kernels.operations import Norm, assert_equal
from kernels.support import EPS_OF

from arat_kernels.split_batch_norm import split_batch_norm

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = EPS_OF[torch.bfloat16] / 2
SHAPES = [(64, 32, 32), (512, 4, 4), (640, 8, 8), (3, 17, 5), (16, 56, 56), (4096, 1, 1)]


def check(norm: Norm, dtype: torch.dtype) -> None:
    tensors = {name: t.to("cuda") for name, t in norm.make(0, dtype).items()}
    # Of float32 results once more for 1/std: Triton's root and division may be 3 ulp off, where
    # PyTorch's are rounded. In 16 bits that is nothing beside the rounding of the result.
    norm.operation.check(tensors, 3.0 if dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (5, 11), (16, 0), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, sizes: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    channels, height, width = shape
    # Among many float32 values some lie so near zero that rounding decides what ReLU does, and
    # their gradients are then all or nothing. In 16 bits PyTorch's own run has more of them.
    kinked = dtype != torch.float32 or sum(sizes) * channels * height * width < 300_000
    check(Norm(sizes, channels, height, width, relu=kinked, pooled=kinked), dtype)


OPTIONS = ("residual", "relu", "pooled", "affine", "training")


@pytest.mark.parametrize("flags", list(product([True, False], repeat=5)), ids=str)
def test_every_combination_of_options(flags: tuple[bool, ...]) -> None:
    options = dict(zip(OPTIONS, flags, strict=True))
    check(Norm((6, 10), 48, 9, 9).changed(**options), torch.bfloat16)


@pytest.mark.parametrize("channels", [1, 64])
def test_large_images(channels: int) -> None:
    check(Norm((1, 2), channels, 224, 224), torch.bfloat16)


def test_nchw() -> None:
    check(Norm((4, 4), 64, 8, 8, channels_last=False), torch.float32)


def test_the_same_bits_every_time() -> None:
    norm = Norm((32, 32), 64, 16, 16)
    tensors = {name: t.to("cuda") for name, t in norm.make(0, torch.bfloat16).items()}
    first = norm.operation.results(tensors, None)
    assert_equal(norm.operation.results(tensors, None), first)


def test_variance_of_values_far_from_zero() -> None:
    x = torch.randn(64, 64, 56, 56, device="cuda") + 1e4
    x = x.contiguous(memory_format=torch.channels_last)
    buffers = torch.zeros(2, 64, device="cuda"), torch.ones(2, 64, device="cuda")
    split_batch_norm(x, None, None, *buffers, (20, 44), training=True, momentum=1.0)
    for row, part in zip(buffers[1], x.split([20, 44]), strict=True):
        expected = part.double().var(dim=(0, 2, 3))
        assert ((row - expected) / expected).abs().max() <= 1e-4


def test_more_than_two_to_the_31_elements() -> None:
    need_gib(40)
    n, channels, area = 1032, 512, (64, 64)
    x = torch.empty(n, channels, *area, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    for i, sample in enumerate(x):
        sample.normal_(mean=i / n, generator=torch.Generator("cuda").manual_seed(i))
    x.requires_grad_()
    buffers = (
        torch.zeros(2, channels, device="cuda"),
        torch.ones(2, channels, device="cuda"),
    )
    y = split_batch_norm(
        x, None, None, *buffers, (500, 532), training=True, momentum=1.0, relu=True
    )
    dy = x.detach().roll(1, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = torch.arange(500, n, device="cuda")
    mean = torch.stack([x[i].detach().double().mean((1, 2)) for i in last]).mean(0)
    var = torch.stack(
        [(x[i].detach().double() - mean[:, None, None]).square().mean((1, 2)) for i in last]
    ).mean(0)
    torch.testing.assert_close(buffers[0][1].double(), mean, rtol=1e-4, atol=1e-6)
    rstd = (var + 1e-5).rsqrt()[:, None, None]
    # Results are rounded once; before that, the tolerance of the mean moves numbers of size 1.
    for i in (500, n - 1):
        xhat = (x[i].detach().double() - mean[:, None, None]) * rstd
        torch.testing.assert_close(y[i].double(), xhat.relu(), rtol=ROUNDING, atol=1e-4)
    g = [dy[i].double() * (y[i] > 0) for i in (n - 1,)]
    sums = torch.zeros(2, channels, dtype=torch.float64, device="cuda")
    for i in last:
        masked = dy[i].double() * (y[i] > 0)
        xhat = (x[i].detach().double() - mean[:, None, None]) * rstd
        sums += torch.stack([masked.mean((1, 2)), (masked * xhat).mean((1, 2))])
    sums /= len(last)
    xhat = (x[n - 1].detach().double() - mean[:, None, None]) * rstd
    expected = rstd * (g[0] - sums[0][:, None, None] - xhat * sums[1][:, None, None])
    torch.testing.assert_close(dx[n - 1].double(), expected, rtol=ROUNDING, atol=1e-4)
