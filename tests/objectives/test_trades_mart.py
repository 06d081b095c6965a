"""TRADES and MART against their published formulas, sample by sample, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.models import use_statistics
from arat_fast.objectives import MART, TRADES, Objective
from arat_fast.objectives.normal_start import START_STD
from arat_fast.training.step import make_train_step


def problem(samples: int = 6) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = randomize(TinyNet()).double()
    source = generator(1)
    x = torch.rand(samples, 3, 8, 8, generator=source, dtype=torch.float64)
    noise = 0.1 * torch.randn(x.shape, generator=source, dtype=torch.float64)
    return model, x, (x + noise).clamp(0, 1), torch.randint(0, 4, (samples,), generator=source)


def trades(clean: Tensor, adv: Tensor, y: Tensor, beta: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b, label in zip(clean, adv, y, strict=True):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        total = total - p[label].log() + beta * (p * (p / q).log()).sum()
    return total / len(y)


def mart(clean: Tensor, adv: Tensor, y: Tensor, beta: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b, label in zip(clean, adv, y, strict=True):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        others = torch.cat([q[:label], q[label + 1 :]])
        bce = -q[label].log() - (1.0001 - others.max() + 1e-12).log()
        divergence = (p * (p.log() - (q + 1e-12).log())).sum()
        total = total + bce + beta * divergence * (1.0000001 - p[label])
    return total / len(y)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
@pytest.mark.parametrize(("build", "formula"), [(TRADES, trades), (MART, mart)])
def test_loss_and_gradients_are_those_of_the_formula(
    build: Callable[[float], Objective],
    formula: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    beta: float,
) -> None:
    model, x, x_adv, y = problem()
    parameters = list(model.parameters())
    with use_statistics(model, "batch"):
        output = build(beta)(model, x, x_adv, y)
        expected = formula(model(x), model(x_adv), y, beta)
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    assert float((sum(output.terms.values()) - output.loss).detach().abs()) <= 1e-12
    got, truth = (torch.autograd.grad(loss, parameters) for loss in (output.loss, expected))
    for a, b in zip(got, truth, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1e-3, float(b.abs().max()))
    assert output.logits_clean is not None and output.logits_adv is not None


def test_mart_stays_finite_where_the_network_is_certain() -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.zeros(len(x), 4)
            logits[:, 1] = 200
            return logits * self.scale

    model = Certain()
    x = torch.rand(3, 3, 4, 4, generator=generator(1))
    loss = MART()(model, x, x, torch.tensor([0, 1, 2])).loss
    (gradient,) = torch.autograd.grad(loss, model.parameters())
    assert loss.isfinite() and gradient.isfinite()
    # Wrong and certain: a cross-entropy of 200 and the largest margin term, twice in three.
    assert float(loss.detach()) == pytest.approx((400 - 2 * math.log(1e-4)) / 3, rel=1e-3)


@pytest.mark.parametrize("build", [TRADES, MART])
def test_the_step_takes_the_objectives_own_attack(build: Callable[[], Objective]) -> None:
    model, x, _, y = problem()
    seen: list[tuple[bool, Tensor]] = []
    model.conv1.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, inputs[0].detach().clone()))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attack = PGD(eps=0.1, alpha=0.03, num_steps=2)
    step = make_train_step(model, build(), attack, optimizer, generator=generator(4), fold=False)
    metrics = step(x, y)
    assert {"loss", "kl", "accuracy_clean", "accuracy_adv"} <= set(metrics)
    starts = [image for training, image in seen if not training and not torch.equal(image, x)]
    deviation = (starts[0] - x).std()
    # 1,152 normal numbers: the deviation of their deviation is 1 / sqrt(2 * 1,152).
    assert float(deviation) == pytest.approx(START_STD, rel=5 / math.sqrt(2 * x.numel()))
    assert [training for training, _ in seen][-2:] == [True, True]
    losses = [float(step(x, y)["loss"]) for _ in range(8)]
    assert losses[-1] < float(metrics["loss"])


@pytest.mark.parametrize("build", [TRADES, MART])
def test_beta_is_checked(build: Callable[[float], Objective]) -> None:
    for beta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="beta must be >= 0, got"):
            build(beta)
