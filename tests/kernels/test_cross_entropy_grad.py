"""The cross-entropy reference and the checks of the public function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.support import generator, randn

from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.implementation import interpreting

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


BAD: list[tuple[str, dict[str, Any]]] = [
    ("logits must be \\(N, K\\)", {"logits": LOGITS[0]}),
    ("logits must be \\(N, K\\)", {"logits": LOGITS[:, :0]}),
    ("logits must be a floating-point", {"logits": LOGITS.int()}),
    ("target must be \\(N,\\) = \\(6,\\)", {"target": TARGET[:5]}),
    ("target must be int64 or int32", {"target": TARGET.float()}),
    ("one device", {"target": TARGET.to("meta")}),
    ("impl must be", {"impl": "liger"}),
]


@pytest.mark.parametrize(("message", "change"), BAD)
def test_bad_input_is_refused(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_grad(**{"logits": LOGITS, "target": TARGET, **change})


@pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on the CPU")
def test_triton_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match='impl="triton"'):
        cross_entropy_grad(LOGITS, TARGET, impl="triton")
