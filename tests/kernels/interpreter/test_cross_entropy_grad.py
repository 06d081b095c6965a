"""The cross-entropy kernel in Triton's interpreter, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.operations import classes
from kernels.support import few, randn
from torch import Tensor

from arat_kernels.cross_entropy_grad import cross_entropy_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 100, 1000, 4096, 4100])
def test_against_the_float64_reference(dtype: torch.dtype, num_classes: int) -> None:
    operation = classes(5, num_classes)
    operation.check(operation.make(0, dtype))


@few(12)
@given(num=st.integers(0, 70), num_classes=st.integers(1, 140), seed=st.integers(0, 99))
def test_any_shape(num: int, num_classes: int, seed: int) -> None:
    operation = classes(num, num_classes)
    tensors = operation.make(seed, torch.float32)
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got["0"].sum(1).abs() < 1e-5).all()


@pytest.mark.parametrize("num_classes", [10, 32, 4100])
def test_slices_and_narrow_targets(num_classes: int) -> None:
    logits, target = classes(12, num_classes).make(1, torch.float32).values()
    expected = cross_entropy_grad(logits, target, impl="triton")
    # The slice is copied to memory of its own, whose rows lie closer than the slice's.
    sliced = torch.cat([randn((12, 1), 7), logits, randn((12, 16), 8)], 1)[:, 1 : num_classes + 1]
    assert sliced.data_ptr() % 16
    got = cross_entropy_grad(sliced, target.int(), impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_gradcheck_of_the_loop_over_a_long_row() -> None:
    logits, target = classes(2, 4097).make(4, torch.float64).values()

    def function(free: Tensor) -> Tensor:
        parts = torch.cat([free, logits[:, 5:]], 1)
        return cross_entropy_grad(parts, target % 5, impl="triton")[1]

    assert torch.autograd.gradcheck(function, logits[:, :5].clone().requires_grad_())
