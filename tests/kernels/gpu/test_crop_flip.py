"""The batch assembly kernel on real hardware, beside what all operations promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arat_kernels.checks import assert_equal, crops, on_gpu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
OUTPUTS: list[dict[str, Any]] = [
    {"dtype": dtype, "memory_format": layout} for dtype in DTYPES for layout in LAYOUTS
]


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64), (2, 7, 11)], ids=str)
@pytest.mark.parametrize("drawn", [True, False])
def test_bit_for_bit(output: dict[str, Any], shape: tuple[int, int, int], drawn: bool) -> None:
    options = {"padding": 4} if drawn else {"padding": 0, "flip": False, "rng": None}
    operation = crops((50, *shape), 128, **output, **options)
    tensors = on_gpu(operation, 0)
    expected = operation.results(tensors, "reference")
    assert_equal(operation.results(tensors, "triton"), expected)
    tensors["images"] = tensors["images"].to(memory_format=torch.channels_last)
    assert_equal(operation.results(tensors, "triton"), expected)
