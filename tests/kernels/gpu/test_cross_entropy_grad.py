"""The cross-entropy kernel on real hardware, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch
from kernels.graphs import need_gib
from kernels.operations import classes
from kernels.support import EPS_OF
from torch import Tensor

from arat_kernels.cross_entropy_grad import cross_entropy_grad

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(num: int, num_classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = classes(num, num_classes).make(0, dtype)
    return {name: t.to("cuda") for name, t in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 200, 1000, 4096, 4097, 21_841])
def test_matches_the_float64_reference(dtype: torch.dtype, num_classes: int) -> None:
    # Triton's exp and log are approximations of 2 ulp, PyTorch's of 1.
    classes().check(case(67, num_classes, dtype), factor=5.0)


@pytest.mark.parametrize("num_classes", [10, 128, 4097])
def test_slices(num_classes: int) -> None:
    logits, target = case(67, num_classes).values()
    # The slice is copied to memory of its own, whose rows lie closer than the slice's.
    wider = torch.full((67, num_classes + 17), torch.nan, device="cuda")
    sliced = wider[:, 1 : num_classes + 1].copy_(logits)
    assert sliced.data_ptr() % 16
    got = cross_entropy_grad(sliced, target, impl="triton")
    expected = cross_entropy_grad(logits, target, impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_classes", [10, 5000])
def test_unknown_targets_and_nan_logits_give_nan(num_classes: int) -> None:
    logits, target = case(5, num_classes).values()
    target[1], target[2] = -1, num_classes
    logits[3, 7] = torch.nan
    dlogits, loss = cross_entropy_grad(logits, target, impl="triton")
    expected = [False, True, True, True, False]
    assert loss.isnan().tolist() == expected
    assert dlogits.isnan().all(1).tolist() == expected
    assert dlogits.isnan().any(1).tolist() == expected


def test_more_than_two_to_the_31_elements() -> None:
    need_gib(20)
    num, num_classes = 2**21 + 7, 1024
    logits = torch.empty(num, num_classes, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    for part in logits.split(2**17):
        part.normal_()
    target = torch.arange(num, device="cuda") % num_classes
    dlogits, loss = cross_entropy_grad(logits, target, impl="triton")
    last = slice(num - 4, num)
    expected = cross_entropy_grad(logits[last].float(), target[last], impl="reference")
    # Rounded once to bfloat16, after float32 arithmetic on probabilities.
    rounding = EPS_OF[torch.bfloat16] / 2
    torch.testing.assert_close(dlogits[last].float(), expected[0], rtol=rounding, atol=1e-6)
    torch.testing.assert_close(loss[last], expected[1], rtol=1e-5, atol=1e-5)
