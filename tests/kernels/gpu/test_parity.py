"""Results on real hardware at many sizes, against the reference in float64 or bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from kernels.operations import (
    SLACK,
    Operation,
    Tensors,
    affine,
    assert_equal,
    classes,
    crops,
    distance,
    relu,
    start,
    step,
)
from kernels.support import to_float64

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def on_gpu(tensors: Tensors) -> Tensors:
    return {name: t.to("cuda") for name, t in tensors.items()}


def affine_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensors:
    """Sixteenths, and 0.03125 off them, so that no y is so near 0 that rounding decides what ReLU
    does."""
    made = affine(shape=shape, layout=layout).make(0, torch.float32)
    scale = made["scale"]
    made["scale"] = scale.sign() * (scale.abs() * 2).round().clamp(1, 4) / 2
    for name in ("x", "residual"):
        made[name] = ((made[name].clamp(-4, 4) * 8).round() / 8).to(dtype)
    made["shift"] = (made["shift"].clamp(-2, 2) * 8).round() / 8 + 0.03125
    return on_gpu(made)


SHAPES = [(8, 64, 32, 32), (8, 512, 4, 4), (6, 640, 8, 8), (4, 160, 16, 16), (5, 3, 17, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_affine(dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    whole = affine_case(shape, dtype, layout)
    for scaled, residual, last in product([True, False], repeat=3):
        kept = {"scale": scaled, "residual": residual}
        tensors = {name: t for name, t in whole.items() if kept.get(name, True)}
        affine(last).check(tensors)
        for result in affine(last).results(tensors, "triton").values():
            assert result.stride() == tensors["x"].stride()


WIDTHS = [(128, (512,) * 4), (512, (320,) + (640,) * 10), (33, (7, 100, 31)), (64, (2048,))]
WIDTHS += [(9, (5000, 16)), (2, (3,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num", "widths"), WIDTHS, ids=str)
def test_cosine_invariance(
    dtype: torch.dtype, targets: torch.dtype, num: int, widths: tuple[int, ...]
) -> None:
    operation = distance(num, widths, targets)
    tensors = on_gpu(operation.make(0, dtype))
    # Triton's division and root are approximations of 2 ulp, PyTorch's are rounded.
    operation.check(tensors, factor=5.0)
    got, truth = operation.results(tensors, None), operation.results(to_float64(tensors), None)
    torch.testing.assert_close(got["0"].double(), truth["0"], rtol=0, atol=4 * SLACK)
    for _ in range(20):
        assert_equal(operation.results(tensors, None), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 200, 1000, 4096, 4097, 21_841])
def test_cross_entropy(dtype: torch.dtype, num_classes: int) -> None:
    operation = classes(67, num_classes)
    # Triton's exp and log are approximations of 2 ulp, PyTorch's of 1.
    operation.check(on_gpu(operation.make(0, dtype)), factor=5.0)


IMAGES = [(128, 3, 32, 32), (5, 3, 17, 9), (2, 3, 224, 224)]
OUTPUTS: list[dict[str, Any]] = [
    {"dtype": dtype, "memory_format": layout} for dtype in DTYPES for layout in LAYOUTS
] + [{"dtype": torch.bfloat16, "split": True}]
EXACT: list[Operation] = [
    *(relu(shape=shape, skip=skip) for shape in SHAPES for skip in (True, False)),
    *(step(shape=shape, layout=layout) for shape in IMAGES for layout in LAYOUTS),
    *(
        crops((50, *shape), 128, **output, **drawn)
        for shape in ((3, 32, 32), (1, 28, 28), (3, 64, 64), (2, 7, 11))
        for output in OUTPUTS
        for drawn in ({"padding": 4}, {"padding": 0, "flip": False, "rng": None})
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", EXACT)
def test_bit_for_bit(operation: Operation, dtype: torch.dtype) -> None:
    tensors = on_gpu(operation.make(0, dtype))
    assert_equal(operation.results(tensors, "triton"), operation.results(tensors, "reference"))
    if "images" in tensors:
        tensors["images"] = tensors["images"].to(memory_format=torch.channels_last)
        assert_equal(operation.results(tensors, "triton"), operation.results(tensors, "reference"))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (7, 3, 64, 64), (2, 3, 224, 224)], ids=str)
def test_l2_step(shape: tuple[int, ...]) -> None:
    operation = step("L2", 0.5, 0.2, shape=shape)
    tensors = on_gpu(operation.make(0, torch.float32))
    wide = {name: t.double() if name[0] == "x" else t for name, t in tensors.items()}
    truth = operation.results(wide, "reference")["0"]
    got = operation.results(tensors, "triton")["0"]
    assert (got.double() - truth).abs().max() <= 8 * SLACK
    lengths = torch.linalg.vector_norm((got - tensors["x"]).double().flatten(1), dim=1)
    assert (lengths <= 0.5 + 1e-5).all() and (lengths > 0.1).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (3, 3, 64, 65), (2, 3, 224, 224)], ids=str)
def test_random_start(norm: str, shape: tuple[int, ...]) -> None:
    operation = start(norm, 0.5, shape=shape)
    made = operation.make(0, torch.float32)
    got = operation.results(on_gpu(made), "triton")["0"]
    on_card = operation.results(on_gpu(made), "reference")["0"]
    for other in (on_card, operation.results(made, "reference")["0"].to("cuda")):
        # A fused multiply-add rounds once where the reference rounds twice. The device's logarithm
        # is coarse near 1, which the shortest of the normal numbers show.
        off = (got - other).abs()
        assert (off > 4 * SLACK).float().mean() <= (0 if norm == "Linf" else 1e-3)
        assert off.max() <= 1e-4
