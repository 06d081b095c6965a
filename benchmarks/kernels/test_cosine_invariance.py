"""The cosine distance of all layers, forward and backward, against PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arat_kernels.cosine_invariance import cosine_invariance

# Batch and widths of the regularised layers: ResNet-18 and WRN-34-10.
CASES = {
    "ResNet-18, batch 128": (128, (512,) * 4),
    "ResNet-18, batch 512": (512, (512,) * 4),
    "WRN-34-10, batch 512": (512, (320,) + (640,) * 10),
}
CALLS = 50


def eager(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    return torch.stack(
        [
            (1 - F.cosine_similarity(p.float(), t.float(), dim=1)).mean()
            for p, t in zip(predictions, targets, strict=True)
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(compare: Callable[..., None], name: str) -> None:
    num, widths = CASES[name]
    numbers = torch.Generator("cuda").manual_seed(0)

    def draw(width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(num, width, generator=numbers, device="cuda").to(dtype)

    given = [
        (
            [draw(w, torch.bfloat16).requires_grad_() for w in widths],
            [draw(w, torch.float32) for w in widths],
        )
        for _ in range(CALLS)
    ]
    dout = torch.rand(len(widths), generator=numbers, device="cuda")
    torch._dynamo.reset()

    def calls(function: Callable[..., Tensor]) -> list[Any]:
        return [lambda p=p, t=t: torch.autograd.grad(function(p, t), p, dout) for p, t in given]

    contestants = {
        "cosine_invariance": calls(cosine_invariance),
        "PyTorch eager": calls(eager),
        "torch.compile": calls(torch.compile(eager, fullgraph=True)),
    }
    expected = contestants["PyTorch eager"][0]()
    for contestant, made in contestants.items():
        for got, value in zip(made[0](), expected, strict=True):
            error = (got.float() - value.float()).norm() / value.float().norm()
            assert error < 0.01, f"{contestant} is off by {error:.1%}: its time would mean nothing"
    # Forward: predictions and targets; backward: both again and the gradient.
    compare(contestants, num * sum(widths) * (3 * 2 + 2 * 4), "cosine_invariance")
