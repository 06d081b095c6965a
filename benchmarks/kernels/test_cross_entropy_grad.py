"""The gradient of the cross-entropy and the losses, against PyTorch autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arat_kernels.cross_entropy_grad import cross_entropy_grad

CASES = [(128, 10), (512, 10), (512, 1000), (16_384, 1000)]


def eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits.float(), target, reduction="none")
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    return dlogits, loss.detach()


@pytest.mark.parametrize(("num", "num_classes"), CASES)
def test_gradient(compare: Callable[..., None], num: int, num_classes: int) -> None:
    numbers = torch.Generator("cuda").manual_seed(0)
    given = []
    for _ in range(30):
        logits = 4 * torch.randn(num, num_classes, generator=numbers, device="cuda")
        target = torch.randint(num_classes, (num,), generator=numbers, device="cuda")
        given.append((logits.bfloat16(), target))

    def closed_form(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = logits.float().log_softmax(1)
        hit = F.one_hot(target, num_classes)
        loss = -(log_probabilities * hit).sum(1)
        return (log_probabilities.exp() - hit).to(logits.dtype), loss

    torch._dynamo.reset()
    compiled = torch.compile(closed_form, fullgraph=True)
    contestants: dict[str, list[Any]] = {
        "cross_entropy_grad": [lambda t=t: cross_entropy_grad(*t) for t in given],
        "PyTorch eager": [lambda t=t: eager(t[0].requires_grad_(), t[1]) for t in given],
        "torch.compile": [lambda t=t: compiled(t[0].detach(), t[1]) for t in given],
    }
    expected = [t.float() for t in eager(given[0][0].clone().requires_grad_(), given[0][1])]
    for name, calls in contestants.items():
        for got, value in zip(calls[0](), expected, strict=True):
            error = (got.detach().float() - value).norm() / value.norm()
            assert error < 0.01, f"{name} is off by {error:.1%}: its time would mean nothing"
    compare(contestants, num * (num_classes * 4 + 12), "cross_entropy_grad")
