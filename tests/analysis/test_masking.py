"""The check for masked gradients: silent on an honest network, loud on those that mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arat_fast.analysis.masking import (
    Tried,
    at_most,
    masking_check,
    not_beaten,
    radii,
    sign_test,
)
from arat_fast.evaluation import ImageSet, ThreatModel

EPS = 0.1
N = 40


class Linear(nn.Module):
    """An honest classifier of 6×6 images in 4 classes: PGD finds its adversarial examples."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 36, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T


class Wrapped(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.before, self.scale = Linear(), before, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.network(self.before(x))


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is right on the grid of sixteenths and reversed off it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(((16 * x) == (16 * x).round()).flatten(1).all(dim=1))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (on_grid,) = ctx.saved_tensors
        return torch.where(on_grid.view(-1, 1, 1, 1), grad, -grad)


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, 15, (N, 1, 6, 6), generator=generator) / 16
    return ImageSet(x, Linear()(x).argmax(dim=1), ("a", "b", "c", "d"))


def check(model: nn.Module, norm: str = "Linf", **options: Any) -> dict[str, Any]:
    eps = EPS if norm == "Linf" else 0.4
    return masking_check(
        model,
        images(),
        ThreatModel(eps, norm),  # type: ignore[arg-type]
        **{"num_steps": 10, "num_restarts": 2, "num_queries": 150, "batch_size": 16, **options},
    )


def failed(record: dict[str, Any]) -> set[str]:
    return {entry["name"] for entry in record["checks"] if not entry["passed"]}


@pytest.mark.parametrize("norm", ["Linf", pytest.param("L2", marks=pytest.mark.slow)])
def test_honest_network_passes(norm: str) -> None:
    record = check(Linear(), norm, sources={"other": Linear()})
    assert record["passed"] and not failed(record)
    names = "gradient, steps, restarts, radius, full range, random, black-box, transfer"
    assert [entry["name"] for entry in record["checks"]] == names.split(", ")
    left = {entry["name"]: entry["correct"] for entry in record["attacks"]}
    assert record["clean_correct"] == N
    # Some images fall and some do not, so that the comparison says something.
    assert 0 < left["PGD-10"] < N


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        (Wrapped(lambda x: (4 * x).round() / 4), {"gradient", "black-box"}),
        (Wrapped(lambda x: x, scale=1e6), {"gradient", "black-box", "full range"}),
        (Wrapped(BadGradient.apply), {"steps", "black-box", "transfer"}),
    ],
    ids=["quantised input", "saturated logits", "reversed gradients"],
)
def test_masked_gradients_are_warned_of(model: nn.Module, warned: set[str]) -> None:
    record = check(model, sources={"honest": Linear()})
    assert not record["passed"] and warned <= failed(record)
    assert ("gradient" in failed(record)) == ("gradient" in warned)


def test_pgd_of_a_linear_network_is_exact() -> None:
    """In L∞ an image falls exactly if margin_k <= eps * ||w_y - w_k||_1 for some k, unclamped."""
    model, data = Linear(), images()
    weight = model.weight.detach().double()
    margins = (data.x.double() - 0.5).flatten(1) @ weight.T
    gaps = margins.gather(1, data.y[:, None]) - margins
    reach = EPS * (weight[data.y][:, None] - weight[None]).abs().sum(dim=2)
    # The images lie at least 2/16 from 0 and 1, so that clamping changes nothing.
    robust = int(((gaps > reach) | (gaps == 0)).all(dim=1).sum())
    left = {e["name"]: e["correct"] for e in check(model, num_restarts=4)["attacks"]}
    assert robust <= left["PGD-10, 4 restarts"] <= robust + 2


def test_global_random_state_and_network_stay() -> None:
    model = Linear().train()
    state = torch.get_rng_state()
    few = {"num_steps": 3, "num_queries": 20}
    first = check(model, **few)
    assert torch.equal(state, torch.get_rng_state())
    assert check(model, **few) == first
    assert model.training and model.weight.grad is None and model.weight.requires_grad


def test_wrong_as_it_is_counts_as_broken_and_square_can_be_left_out() -> None:
    data = images()
    data.y[:5] = (data.y[:5] + 1) % 4
    options = {"num_steps": 3, "num_restarts": 2, "num_queries": 0, "batch_size": 16}
    record = masking_check(
        Linear(), data, ThreatModel(1e-4), sources={"other": Linear()}, **options
    )
    assert record["clean_correct"] == N - 5
    assert {entry["correct"] for entry in record["attacks"]} == {N - 5}
    assert "black-box" not in {entry["name"] for entry in record["checks"]}


@pytest.mark.parametrize(
    ("eps", "options"),
    [
        (EPS, {"num_steps": 1}),
        (EPS, {"num_restarts": 1}),
        (EPS, {"num_queries": -1}),
        (0.0, {}),
    ],
)
def test_arguments_are_checked(eps: float, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected|radius"):
        masking_check(Linear(), images(), ThreatModel(eps), batch_size=8, **options)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 0), (6, 1), (20, 31), (900, 700)])
def test_sign_test_is_the_binomial_tail(wins: int, losses: int) -> None:
    n = wins + losses
    exact = Fraction(sum(math.comb(n, k) for k in range(wins, n + 1)), 2**n)
    assert math.isclose(sign_test(wins, losses), float(exact), rel_tol=1e-9)


def test_radii_double_up_to_the_whole_range() -> None:
    assert radii(ThreatModel(0.12), 64) == [0.06, 0.12, 0.24, 0.48, 1.0]
    assert radii(ThreatModel(1.0, "L2"), 64) == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert radii(ThreatModel(1.0), 64) == [0.5, 1.0]
    assert radii(ThreatModel(16.0, "L2"), 64) == [8.0, 8.0]


def tried(left: int, of: int = 40) -> Tried:
    return Tried("gradient", "PGD", torch.arange(of) < left, {})


# Seven images to none are the fewest that count.
@pytest.mark.parametrize(("rival", "passed"), [(30, True), (10, True), (4, True), (3, False)])
def test_a_rival_may_break_more_by_chance_only(rival: int, passed: bool) -> None:
    # Against 10 that are left; of several rivals the least likely one decides.
    found = not_beaten("steps", [(tried(12), tried(10)), (tried(rival), tried(10))])
    assert found["passed"] == passed


@pytest.mark.parametrize(
    ("name", "number", "most"), [("gradient", "zero", 2), ("restarts", "gained", 4)]
)
def test_shares_have_a_limit(name: str, number: str, most: int) -> None:
    for count, passed in ((0, True), (most, True), (most + 1, False)):
        found = at_most(name, count, 40, "text")
        assert found["passed"] == passed and found[number] == count
