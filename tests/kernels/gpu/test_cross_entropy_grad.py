"""The cross-entropy kernel on real hardware, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch

from arat_kernels.checks import classes, on_gpu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 200, 1000, 4096, 4097, 21_841])
def test_matches_the_float64_reference(dtype: torch.dtype, num_classes: int) -> None:
    operation = classes(67, num_classes)
    # Triton's exp and log are approximations of 2 ulp, PyTorch's of 1.
    operation.check(on_gpu(operation, 0, dtype), factor=5.0)
