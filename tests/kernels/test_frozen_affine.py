"""The affine reference and the checks of its public functions."""

from __future__ import annotations

import torch

from arat_kernels.checks import randn
from arat_kernels.frozen_affine import frozen_affine

X = randn((2, 3, 4, 4), 0)
SCALE, SHIFT = randn((3,), 1), randn((3,), 2)


def test_is_eval_batch_norm_with_residual_and_relu() -> None:
    norm = torch.nn.BatchNorm2d(3).eval()
    for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
        assert t is not None
        t.data.copy_(randn((3,), 10 + i))
    assert norm.running_var is not None
    norm.running_var.copy_(randn((3,), 13).square() + 0.1)
    residual, dy = randn((2, 3, 4, 4), 14), randn((2, 3, 4, 4), 15)
    leaves = [X.clone().requires_grad_(), residual.requires_grad_()]
    expected = (norm(leaves[0]) + leaves[1]).relu()
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
    got = frozen_affine(leaves[0], scale, shift, residual=leaves[1])
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradient_is_masked_by_the_saved_output() -> None:
    # 2^-26 is positive in float32 and 0 in float16.
    x = torch.full((1, 1, 1, 2), 2.0**-13, dtype=torch.float16).requires_grad_()
    scale, shift = torch.tensor([2.0**-13]), torch.tensor([0.0])
    y = frozen_affine(x, scale, shift)
    assert (y == 0).all()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.zeros_like(dx))


def test_constants_that_require_a_gradient_are_fine_without_grad_mode() -> None:
    with torch.no_grad():
        y = frozen_affine(X, SCALE.clone().requires_grad_(), SHIFT)
    torch.testing.assert_close(y, (X * SCALE.view(3, 1, 1) + SHIFT.view(3, 1, 1)).relu())
