"""Adversarial weight perturbation against its authors' procedure, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import TinyNet, assert_same_gradients, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD, RandomStart
from arat_fast.models import convert_split_batch_norm
from arat_fast.objectives import ARAT, TRADES, AdversarialTraining, Objective
from arat_fast.training.awp import AWP
from arat_fast.training.step import TrainStep, adversarial_batch

GAMMA = 0.03
ATTACK = PGD(0.1, 0.05, 2)


def objectives(name: str) -> tuple[nn.Module, Objective]:
    torch.manual_seed(0)
    model = TinyNet().double()
    if name == "arat":
        model = convert_split_batch_norm(model)
    randomize(model)
    objective = {
        "at": AdversarialTraining,
        "trades": TRADES,
        "arat": lambda: ARAT(model, ("bn2",), (3, 8, 8)).double(),
    }[name]()
    return model, objective


def transcription(
    model: nn.Module, objective: Objective, x: Tensor, x_adv: Tensor, y: Tensor, lr: float
) -> None:
    """A proxy ascends the loss by one step of SGD; the network is moved along that step, scaled to
    each layer's weights, descends there, and is moved back."""
    proxy, beside = copy.deepcopy((model, objective))
    ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-beside(proxy, x, x_adv, y, RandomStart()).loss).backward()
    ascent.step()
    moves = {}
    moved = dict(proxy.named_parameters())
    for name, weight in model.named_parameters():
        if name in ("conv1.weight", "conv2.weight", "head.weight"):
            delta = (moved[name] - weight).detach()
            moves[name] = GAMMA * weight.detach().norm() / (delta.norm() + 1e-20) * delta
    parameters = dict(model.named_parameters())
    descent = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=lr, momentum=0.9)
    with torch.no_grad():
        for name, move in moves.items():
            parameters[name].add_(move)
    objective(model, x, x_adv, y, RandomStart()).loss.backward()
    descent.step()
    with torch.no_grad():
        for name, move in moves.items():
            parameters[name].sub_(move)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(6, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    noise = 0.05 * torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    return x, torch.randint(0, 4, (6,), generator=generator(2)), noise


def make_step(
    model: nn.Module, objective: Objective, lr: float, awp: AWP | None, accumulate: int = 1
) -> TrainStep:
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return TrainStep(
        model, objective, ATTACK, optimizer, awp=awp, accumulate=accumulate, say=lambda text: None
    )


@pytest.mark.parametrize("name", ["at", "trades", "arat"])
def test_a_step_is_the_authors(name: str) -> None:
    model, objective = objectives(name)
    plain, beside = copy.deepcopy((model, objective))
    x, y, noise = batch()
    make_step(model, objective, 0.2, AWP(GAMMA))(x, y, noise)
    _, x_adv = adversarial_batch(
        plain.train(), beside.train(), ATTACK, x, y, RandomStart(noise=noise)
    )
    transcription(plain, beside, x, x_adv, y, 0.2)
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).detach().abs().max() <= 1e-13, key
    assert_same_gradients(nn.ModuleList([model, objective]), nn.ModuleList([plain, beside]))


def test_a_perturbation_raises_the_loss_and_is_taken_back() -> None:
    model, objective = objectives("at")
    before = copy.deepcopy(list(model.parameters()))
    x, y, noise = batch()
    losses, gradients = [], []
    for awp in (None, AWP(0.0), AWP(GAMMA)):
        losses.append(float(make_step(model, objective, 0.0, awp)(x, y, noise)["loss"]))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert losses[0] == losses[1] < losses[2]
    for plain, unmoved, moved in zip(*gradients, strict=True):
        assert (plain - unmoved).abs().max() <= 1e-14
        assert not torch.equal(plain, moved)
    # Also where every part of the batch perturbs by itself.
    make_step(model, objective, 0.0, AWP(GAMMA), accumulate=2)(x, y, noise)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
