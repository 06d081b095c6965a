"""The cross-entropy kernel in Triton's interpreter, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import assert_within_budget, at_an_odd_place, few, generator, randn
from torch import Tensor

from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.cross_entropy_grad.triton import _cross_entropy_grad_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    num: int, num_classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    target = torch.randint(num_classes, (num,), generator=generator(seed))
    return (4 * randn((num, num_classes), seed + 1)).to(dtype), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 10, 100, 1000, 4096, 4100])
def test_against_the_float64_reference(dtype: torch.dtype, num_classes: int) -> None:
    logits, target = case(5, num_classes, dtype)
    dlogits, loss = cross_entropy_grad(logits, target, impl="triton")
    baseline = cross_entropy_grad(logits, target, impl="reference")
    truth = cross_entropy_grad(logits.double(), target, impl="reference")
    assert dlogits.dtype == dtype and loss.dtype == torch.float32
    assert_within_budget(dlogits, truth[0], baseline[0], "dlogits")
    assert_within_budget(loss, truth[1], baseline[1], "loss")


@few(12)
@given(num=st.integers(0, 70), num_classes=st.integers(1, 140), seed=st.integers(0, 99))
def test_any_shape(num: int, num_classes: int, seed: int) -> None:
    logits, target = case(num, num_classes, seed=seed)
    got = cross_entropy_grad(logits, target, impl="triton")
    for mine, expected in zip(got, cross_entropy_grad(logits, target), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert (got[0].sum(1).abs() < 1e-5).all()


def test_strides_and_narrow_targets() -> None:
    logits, target = case(12, 20)
    for view in (logits[::2, 3:], logits.T.contiguous().T[:6, 3:]):
        got = cross_entropy_grad(view, target.int()[::2] % 17, impl="triton")
        expected = cross_entropy_grad(view.contiguous(), target[::2] % 17)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_classes", [10, 32, 4100])
def test_tensors_at_odd_places(num_classes: int) -> None:
    logits, target = case(5, num_classes)
    expected = cross_entropy_grad(logits, target, impl="triton")
    # The slice is copied to memory of its own, whose rows lie closer than the slice's.
    wider = torch.cat([randn((5, 1), 7), logits, randn((5, 16), 8)], 1)
    sliced = wider[:, 1 : num_classes + 1]
    assert sliced.data_ptr() % 16
    for moved in (at_an_odd_place(logits), sliced):
        got = cross_entropy_grad(moved, at_an_odd_place(target), impl="triton")
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("num_classes", [10, 4100])
def test_unknown_targets_give_nan(impl: str, num_classes: int) -> None:
    logits, target = case(4, num_classes)
    target[1], target[2] = -1, num_classes
    dlogits, loss = cross_entropy_grad(logits, target, impl=impl)
    expected = torch.tensor([False, True, True, False])
    assert torch.equal(loss.isnan(), expected)
    assert torch.equal(dlogits.isnan(), expected[:, None].expand(4, num_classes))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("num_classes", [10, 4100])
def test_extreme_logits_as_torch(impl: str, num_classes: int) -> None:
    logits, target = case(5, num_classes)
    logits[0] *= 1e30
    logits[1, target[1]] = 1e4
    logits[2, target[2]] = -1e4
    logits[3, (target[3] + 1) % num_classes] = -math.inf
    logits[4, 0] = math.nan
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, reduction="none")
    (dexpected,) = torch.autograd.grad(expected.sum(), leaf)
    dlogits, loss = cross_entropy_grad(logits, target, impl=impl)
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    torch.testing.assert_close(dlogits, dexpected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_classes", [5, 4097])
def test_gradcheck(num_classes: int) -> None:
    logits, target = case(2, num_classes, torch.float64)
    target %= 5
    constant = logits[:, 5:]

    def function(free: Tensor) -> Tensor:
        return cross_entropy_grad(torch.cat([free, constant], 1), target, impl="triton")[1]

    assert torch.autograd.gradcheck(function, logits[:, :5].clone().requires_grad_())


def test_gradient_of_the_losses_is_scaled_and_the_other_output_has_none() -> None:
    logits, target = case(6, 10)
    dloss = randn((6,), 9)
    for impl in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        dlogits, loss = cross_entropy_grad(leaf, target, impl=impl)
        assert not dlogits.requires_grad
        (got,) = torch.autograd.grad(loss, leaf, dloss)
        torch.testing.assert_close(got, dlogits * dloss[:, None])


def test_operator_passes_opcheck() -> None:
    logits, target = case(4, 10)
    torch.library.opcheck(_cross_entropy_grad_op, (logits, target))
    torch.library.opcheck(_cross_entropy_grad_op, (logits.clone().requires_grad_(), target))


def test_compiles_to_one_graph() -> None:
    logits, target = case(4, 10)
    dloss = randn((4,), 9)

    def losses(logits: Tensor) -> Tensor:
        return cross_entropy_grad(logits * 2, target, impl="triton")[1] * 3

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf, dloss)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
