"""The cosine kernels in Triton's interpreter, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.operations import assert_equal, distance
from kernels.support import few
from torch import Tensor

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.cosine_invariance import triton as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [None, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num", "widths"),
    [(33, (100, 7)), (3, (600,)), (2, (2100, 30)), (2, tuple(range(8, 21)))],
    ids=str,
)
def test_against_the_float64_reference(
    dtype: torch.dtype, targets: torch.dtype | None, num: int, widths: tuple[int, ...]
) -> None:
    operation = distance(num, widths, targets)
    operation.check(operation.make(0, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_targets_of_another_narrow_dtype(dtype: torch.dtype) -> None:
    operation = distance(targets=torch.bfloat16)
    narrow = operation.make(1, dtype)
    wide = {name: t.float() if name[0] == "t" else t for name, t in narrow.items()}
    assert_equal(operation.results(narrow, "triton"), operation.results(wide, "triton"))


@few(10)
@given(
    num=st.integers(1, 9),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_shape(num: int, widths: list[int], seed: int) -> None:
    operation = distance(num, tuple(widths))
    tensors = operation.make(seed, torch.float32)
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (got["0"] > -1e-6).all() and (got["0"] < 2 + 1e-6).all()


def test_gradcheck_of_the_loop_over_a_long_row() -> None:
    p, t = distance(2, (2049,)).make(6, torch.float64).values()

    def function(free: Tensor) -> Tensor:
        return cosine_invariance([torch.cat([free, p[:, 3:]], 1)], [t], impl="triton")

    assert torch.autograd.gradcheck(function, p[:, :3].clone().requires_grad_())


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(kernels._counters, "take", lambda device: counters)
    operation = distance(70, (8, 9))
    tensors = operation.make(7, torch.float32)
    first = operation.results(tensors, "triton")
    assert counters.tolist() == [0, 0]
    assert_equal(operation.results(tensors, "triton"), first)
