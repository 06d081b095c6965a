"""The PGD kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch

from arat_kernels.checks import SLACK, on_gpu, start, step

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMAGES = [(128, 3, 32, 32), (5, 3, 17, 9), (2, 3, 224, 224)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    operation = step(shape=shape, layout=layout)
    operation.check(on_gpu(operation, 0, dtype))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (7, 3, 64, 64), (2, 3, 224, 224)], ids=str)
def test_l2_step(shape: tuple[int, ...]) -> None:
    operation = step("L2", 0.5, 0.2, shape=shape)
    tensors = on_gpu(operation, 0, torch.float32)
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
    made, moved = operation.make(0, torch.float32), on_gpu(operation, 0, torch.float32)
    got = operation.results(moved, "triton")["0"]
    on_card = operation.results(moved, "reference")["0"]
    for other in (on_card, operation.results(made, "reference")["0"].to("cuda")):
        # A fused multiply-add rounds once where the reference rounds twice. The device's logarithm
        # is coarse near 1, which the shortest of the normal numbers show.
        off = (got - other).abs()
        assert (off > 4 * SLACK).float().mean() <= (0 if norm == "Linf" else 1e-3)
        assert off.max() <= 1e-4
