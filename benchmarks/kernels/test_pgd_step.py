"""The PGD update and its random start against PyTorch eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_kernels.pgd_step import pgd_step, random_start

# Batches of CIFAR and of ImageNet size; the inputs of all calls of a graph together are far over
# the L2 cache.
SHAPES = [(512, 3, 32, 32), (4096, 3, 32, 32), (128, 3, 224, 224)]
BYTES_PER_GRAPH = 2e9
EPS, ALPHA = 8 / 255, 2 / 255


def step(x_adv: Tensor, grad: Tensor, x: Tensor, norm: Any) -> Tensor:
    """As a user writes it, without the check for NaN."""
    if norm == "Linf":
        moved = x_adv + ALPHA * grad.sign()
        return torch.minimum(torch.maximum(moved, x - EPS), x + EPS).clamp(0, 1)
    lengths = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
    delta = x_adv + ALPHA * grad / lengths.clamp_min(1e-12) - x
    lengths = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return (x + delta * (EPS / lengths.clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)


def inputs(shape: tuple[int, ...], tensors: int) -> list[list[Tensor]]:
    numbers = torch.Generator("cuda").manual_seed(0)
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return [
        [torch.rand(shape, generator=numbers, device="cuda") for _ in range(tensors)]
        for _ in range(max(2, min(500, round(BYTES_PER_GRAPH / (4 * tensors * elements)))))
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_step(compare: Callable[..., None], shape: tuple[int, ...], norm: Any) -> None:
    given = inputs(shape, 3)
    for _, grad, _ in given:
        grad.sub_(0.5)

    def in_place(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        return x_adv.copy_(step(x_adv, grad, x, norm))

    torch._dynamo.reset()
    compiled = torch.compile(in_place, fullgraph=True)
    contestants = {
        "pgd_step": [lambda t=t: pgd_step(*t, eps=EPS, alpha=ALPHA, norm=norm) for t in given],
        "PyTorch eager": [lambda t=t: in_place(*t) for t in given],
        "torch.compile": [lambda t=t: compiled(*t) for t in given],
    }
    before = [t.clone() for t in given[0]]
    expected = step(*before, norm)
    for name, calls in contestants.items():
        given[0][0].copy_(before[0])
        calls[0]()
        error = (given[0][0] - expected).abs().max()
        assert error < 1e-5, f"{name} is off by {error}: its time would mean nothing"
    compare(contestants, 4 * 4 * given[0][0].numel(), "pgd_step")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_start(compare: Callable[..., None], shape: tuple[int, ...], norm: Any) -> None:
    given = inputs(shape, 1)
    rng = torch.tensor([1, 2], device="cuda")

    def eager(x: Tensor) -> Tensor:
        if norm == "Linf":
            return x + torch.empty_like(x).uniform_(-EPS, EPS)
        delta = torch.randn_like(x)
        lengths = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return x + delta * (EPS * torch.rand_like(lengths) / lengths)

    contestants = {
        "random_start": [lambda t=t: random_start(t[0], rng, eps=EPS, norm=norm) for t in given],
        "PyTorch eager": [lambda t=t: eager(t[0]) for t in given],
    }
    got = contestants["random_start"][0]()
    expected = random_start(given[0][0], rng, eps=EPS, norm=norm, impl="reference")
    assert (got - expected).abs().max() < 1e-5
    compare(contestants, 2 * 4 * given[0][0].numel(), "pgd_step")
