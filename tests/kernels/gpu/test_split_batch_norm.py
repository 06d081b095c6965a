"""Split BatchNorm's kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernels.graphs import capture

from arat_kernels.checks import Norm, assert_equal
from arat_kernels.implementation import Experiment, experimental
from arat_kernels.split_batch_norm import one_pass

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


# All channels at once, in turns of 32 and of 16 or 8, one branch, 640 channels, few rows.
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((40, 40), (64, 32, 32)),
        ((128, 128), (64, 32, 32)),
        ((0, 256), (64, 32, 32)),
        ((16, 48), (640, 8, 8)),
        ((5, 3), (512, 4, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass(
    dtype: torch.dtype, residual: bool, sizes: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    kinked = dtype != torch.float32
    norm = Norm(sizes, *shape, residual=residual, relu=kinked, pooled=False)
    x = torch.empty(sum(sizes), *shape, dtype=dtype, device="cuda")
    if not all(one_pass.fits(x, sizes[0], which) for which in ("forward", "backward")):
        pytest.skip("the registers of this card do not hold it")
    with experimental("one_pass"):
        check(norm, dtype)


@pytest.mark.parametrize("way", ["one_pass", "dependent_launch"])
def test_replays_see_changed_inputs(way: Experiment) -> None:
    """What a launch of the replay before has left, its counters included, is no part of it."""
    if way == "dependent_launch" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    norm = Norm((128, 128), 64, 32, 32, pooled=False, update=False)
    inputs = [
        {name: t.to("cuda") for name, t in norm.make(seed, torch.bfloat16).items()}
        for seed in range(3)
    ]
    static = {name: t.clone() for name, t in inputs[0].items()}
    with experimental(way):
        graph, results = capture(lambda: norm.operation.results(static, None))
        for replay in range(48):
            given = inputs[replay % 3]
            for name, t in static.items():
                t.copy_(given[name])
            graph.replay()
            assert_equal(results, norm.operation.results(given, None))
