"""The cross-entropy reference and the checks of the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arat_kernels.checks import generator, randn
from arat_kernels.cross_entropy_grad import cross_entropy_grad

LOGITS = 3 * randn((6, 10), 0)
TARGET = torch.randint(10, (6,), generator=generator(1))
WEIGHTS = torch.rand((6, 10), generator=generator(2), dtype=torch.float64)


@pytest.mark.parametrize("target", [TARGET, WEIGHTS], ids=["classes", "weights"])
def test_is_the_gradient_of_the_summed_cross_entropy(target: Tensor) -> None:
    leaf = LOGITS.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target, reduction="sum"), leaf)
    dlogits, loss = cross_entropy_grad(LOGITS.double(), target)
    assert (dlogits - expected).abs().max() <= 1e-14
    assert (loss - F.cross_entropy(leaf.detach(), target, reduction="none")).abs().max() <= 1e-13
