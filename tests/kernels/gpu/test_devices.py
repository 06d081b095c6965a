"""Every operation on a card that is not the current one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.support import randn
from torch import Tensor

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.crop_flip import crop_flip
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.frozen_affine import frozen_affine
from arat_kernels.implementation import Impl
from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.split_batch_norm import split_batch_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def image(seed: int) -> Tensor:
    return randn((4, 32, 8, 8), seed).to("cuda:1")


def channels(seed: int) -> Tensor:
    return randn((2, 32), seed).to("cuda:1")


def batch_norm(impl: Impl) -> Tensor:
    x = image(0).requires_grad_()
    running = channels(1), channels(2).abs() + 0.5
    affine = channels(3), channels(4)
    y = split_batch_norm(x, *affine, *running, (2, 2), training=True, impl=impl)
    return torch.autograd.grad(y, x, image(5))[0]


def cosine(impl: Impl) -> Tensor:
    prediction = channels(0).requires_grad_()
    out = cosine_invariance([prediction], [channels(1)], impl=impl)
    return torch.autograd.grad(out, prediction, randn((1,), 2).to("cuda:1"))[0]


def affine(impl: Impl) -> Tensor:
    x = image(0).requires_grad_()
    y = frozen_affine(x, channels(1)[0], channels(2)[0], impl=impl)
    return torch.autograd.grad(y, x, image(3))[0]


def crops(impl: Impl) -> Tensor:
    images = torch.arange(300, device="cuda:1").to(torch.uint8).view(4, 3, 5, 5)
    rng = torch.tensor([3, 4], device="cuda:1")
    index = torch.tensor([2, 0], device="cuda:1")
    return crop_flip(images, index, padding=1, flip=True, rng=rng, impl=impl)


def start(impl: Impl) -> Tensor:
    rng = torch.tensor([3, 4], device="cuda:1")
    return random_start(image(0), rng, eps=0.1, norm="L2", impl=impl)


OPERATIONS: dict[str, Callable[[Impl], Tensor]] = {
    "split_batch_norm": batch_norm,
    "frozen_affine": affine,
    "cosine_invariance": cosine,
    "cross_entropy_grad": lambda impl: cross_entropy_grad(
        channels(0), torch.tensor([3, 31], device="cuda:1"), impl=impl
    )[0],
    "crop_flip": crops,
    "pgd_step": lambda impl: pgd_step(image(0), image(1), image(0), eps=0.1, alpha=0.05, impl=impl),
    "random_start": start,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_on_a_card_that_is_not_current(operation: Callable[[Impl], Tensor]) -> None:
    with torch.cuda.device(0):
        got, expected = operation("triton"), operation("reference")
    assert got.device == expected.device == torch.device("cuda", 1)
    # Where the kernel ran is the question, garbage the alternative; other tests are about rounding.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
