"""The cross-entropy reference and the checks of the public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
