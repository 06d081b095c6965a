"""The PGD reference and the checks of its public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import few

from arat_kernels.checks import randn
from arat_kernels.pgd_step import pgd_step, random_start

X = torch.full((2, 3, 4, 4), 0.5)
RNG = torch.tensor([1, 2])


def test_linf_is_the_textbook_update() -> None:
    x = torch.tensor([[0.0, 0.5, 0.5, 0.99]])
    x_adv = torch.tensor([[0.0, 0.53, 0.5, 0.99]])
    grad = torch.tensor([[-3.0, 1e-9, 0.0, 2.0]])
    got = pgd_step(x_adv, grad, x, eps=0.04, alpha=0.02)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.54, 0.5, 1.0]]))


def test_l2_is_the_textbook_update() -> None:
    x = torch.full((2, 2), 0.5)
    x_adv = torch.tensor([[0.5, 0.5], [0.7, 0.5]])
    grad = torch.tensor([[3e-6, 4e-6], [10.0, 0.0]])
    got = pgd_step(x_adv, grad, x, eps=0.3, alpha=0.2, norm="L2")
    torch.testing.assert_close(got, torch.tensor([[0.62, 0.66], [0.8, 0.5]]))


def test_x_adv_that_requires_a_gradient_is_still_a_leaf() -> None:
    x_adv = X.clone().requires_grad_()
    got = pgd_step(x_adv, randn((2, 3, 4, 4), 0), X, eps=0.1, alpha=0.1)
    assert got is x_adv and x_adv.is_leaf and x_adv.requires_grad
    assert (x_adv - X).abs().min() > 0.05


@few(20)
@given(size=st.integers(1, 200), num=st.integers(0, 5), norm=st.sampled_from(["Linf", "L2", "L1"]))
def test_start_lies_in_the_ball(size: int, num: int, norm: Any) -> None:
    x = torch.zeros(num, size)
    delta = random_start(x, RNG, eps=0.25, norm=norm)
    assert delta.isfinite().all()
    if norm == "Linf":
        assert (delta >= -0.25).all() and (delta < 0.25).all()
    else:
        order = {"L2": 2, "L1": 1}[norm]
        assert (torch.linalg.vector_norm(delta.double(), order, dim=1) <= 0.25 * (1 + 1e-6)).all()


def test_parts_of_a_batch_start_in_l1_as_the_whole() -> None:
    whole, rest = (
        random_start(torch.zeros(n, 7), RNG, eps=0.25, norm="L1", first=5 - n) for n in (5, 2)
    )
    assert torch.equal(whole[3:], rest)


def test_linf_start_is_uniform() -> None:
    draws = random_start(torch.zeros(64, 1024), RNG, eps=1.0).double()
    # Means over n numbers of variance v stay within 5 sqrt(v / n).
    n = draws.numel()
    assert abs(draws.mean()) < 5 * math.sqrt(1 / 3 / n)
    assert abs(draws.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert abs((draws[:, 1:] * draws[:, :-1]).mean()) < 5 / 3 / math.sqrt(n)
    histogram = torch.histc(draws, 64, -1, 1)
    chi_squared = ((histogram - n / 64) ** 2 / (n / 64)).sum()
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)


def test_l2_start_has_a_uniform_radius_and_direction() -> None:
    draws = random_start(torch.zeros(4096, 7), RNG, eps=1.0, norm="L2").double()
    radius = torch.linalg.vector_norm(draws, dim=1)
    n = radius.numel()
    assert abs(radius.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(radius.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    direction = draws / radius[:, None]
    assert direction.mean(0).abs().max() < 5 * math.sqrt(1 / 7 / n)
    covariance = direction.T @ direction / n
    assert (covariance - torch.eye(7) / 7).abs().max() < 5 * math.sqrt(1 / 7 / n)


def test_the_start_is_not_clamped_to_the_image_range() -> None:
    assert random_start(torch.zeros(1, 100), RNG, eps=0.1).min() < 0
