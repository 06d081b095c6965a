"""The cross-entropy reference and the checks of the public function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from arat_kernels.checks import generator, randn
from arat_kernels.cross_entropy_grad import cross_entropy_grad

LOGITS = 3 * randn((6, 10), 0)
TARGET = torch.randint(10, (6,), generator=generator(1))


def test_is_the_gradient_of_the_summed_cross_entropy() -> None:
    leaf = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, TARGET, reduction="sum"), leaf)
    dlogits, loss = cross_entropy_grad(LOGITS, TARGET)
    torch.testing.assert_close(dlogits, expected)
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS, TARGET, reduction="none"))


def test_attack_gradient_is_that_of_the_loss() -> None:
    weight, x = randn((10, 7), 2), randn((6, 7), 3)
    leaf = x.clone().requires_grad_()
    logits = leaf.tanh() @ weight.T
    dlogits, loss = cross_entropy_grad(logits.detach(), TARGET)
    (got,) = torch.autograd.grad(logits, leaf, dlogits)
    leaf = x.clone().requires_grad_()
    total = F.cross_entropy(leaf.tanh() @ weight.T, TARGET, reduction="sum")
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(loss.sum(), total.detach())


class Writing(TorchDispatchMode):
    """Names of the operators that make a tensor, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_operator_where_autograd_runs_five() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from arat_kernels.cross_entropy_grad.triton import forward

    leaf = LOGITS.clone().requires_grad_()
    with Writing() as autograd:
        torch.autograd.grad(F.cross_entropy(leaf, TARGET, reduction="sum"), leaf)
    assert autograd.names == [
        "aten::_log_softmax",
        "aten::nll_loss_forward",
        "aten::ones_like",
        "aten::nll_loss_backward",
        "aten::_log_softmax_backward_data",
    ]
    # Fake tensors: the count needs no kernel run.
    with FakeTensorMode() as fake:
        logits, target = fake.from_tensor(LOGITS), fake.from_tensor(TARGET)
        with Writing() as ours:
            forward(logits, target)
    assert ours.names == ["arat_kernels::cross_entropy_grad"]
