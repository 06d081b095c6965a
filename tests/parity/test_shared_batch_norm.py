"""The ablation without split BatchNorm under ``--compat official``: three steps, in float64, are
those of a direct transcription of the official code's epoch with one branch for every pass."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SeenBatchNorm2d, generator, published_predictors, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.build import build_network, build_objective
from arat_fast.config import Config
from arat_fast.objectives import ARAT
from arat_fast.recipes import recipe
from arat_fast.training.step import TrainStep

LAYERS = ("layer2.0.bn2", "layer3.0.bn2")
EPS, ALPHA, NUM_STEPS = 0.12, 0.03, 3


DATA = 4, (1, 8, 8)
"""Classes and shape of the images."""


def shared(compat: str, **objective: Any) -> Config:
    config = recipe("digits", compat)  # type: ignore[arg-type]  # one of the two
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, norm="shared"),
        attack=dataclasses.replace(config.attack, eps=EPS, alpha=ALPHA, num_steps=NUM_STEPS),
        objective=dataclasses.replace(config.objective, layers=LAYERS, **objective),
    )


def built(config: Config) -> tuple[nn.Module, ARAT]:
    torch.manual_seed(3)
    model = randomize(build_network(config, *DATA)).double()
    objective = build_objective(config, model, *DATA).double()
    assert isinstance(objective, ARAT)
    objective.start_epoch(0.3)
    return model, objective


class Transcription:
    """The official epoch: attack in training mode around the noised images, clean pass, adversarial
    pass, loss, SGD; one BatchNorm for all of them."""

    def __init__(self, model: nn.Module, objective: ARAT) -> None:
        assert objective.predictors is not None
        self.model = copy.deepcopy(model)
        self.predictors = published_predictors(objective.predictors)
        SeenBatchNorm2d.put(self.model, LAYERS)
        parameters = [*self.model.parameters()]
        for module in self.predictors:
            parameters += module.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4)

    def features(self) -> dict[str, Tensor]:
        return {path: SeenBatchNorm2d.feature(self.model, path) for path in LAYERS}

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        self.model.train()
        x = x + noise
        x_adv = x
        for _ in range(NUM_STEPS):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.model(x_adv), y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + ALPHA * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        clean, z_clean = self.model(x), self.features()
        adv, z_adv = self.model(x_adv), self.features()
        loss = 0.3 * F.cross_entropy(adv, y) + 0.7 * F.cross_entropy(clean, y)
        for path, head in zip(LAYERS, self.predictors, strict=True):
            cosine = F.cosine_similarity(head(z_adv[path]), z_clean[path].detach(), dim=1)
            loss = loss + 30 / len(LAYERS) * (1 - cosine).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(number)
    x = torch.rand(6, 1, 8, 8, generator=source, dtype=torch.float64)
    noise = EPS * (2 * torch.rand(x.shape, generator=source, dtype=torch.float64) - 1)
    return x, torch.randint(0, 4, (6,), generator=source), noise


@pytest.mark.parametrize("separate", [True, False])
def test_three_steps_of_the_official_code(separate: bool) -> None:
    """With the statistics of the mixture, the first loss differs already."""
    config = shared("official", separate_passes=separate)
    model, objective = built(config)
    theirs = Transcription(model, objective)
    step = TrainStep(
        model,
        objective,
        config.attack,
        torch.optim.SGD(
            [*model.parameters(), *objective.parameters()], 0.1, momentum=0.9, weight_decay=5e-4
        ),
        noisy_clean=config.step.noisy_clean,
    )
    assert isinstance(config.attack, PGD) and config.attack.bn == "batch_update"
    for number in range(3):
        x, y, noise = batch(number)
        expected, got = theirs(x, y, noise), step(x, y, noise)["loss"]
        if not separate:
            assert abs(float(got - expected)) > 1e-3 * float(expected)
            return
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
    for (name, ours), tensor in zip(
        model.state_dict().items(), theirs.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_who_makes_separate_passes() -> None:
    assert built(shared("official"))[1].separate_passes
    assert not built(shared("paper"))[1].separate_passes
    split = dataclasses.replace(
        shared("official"), model=dataclasses.replace(shared("official").model, norm="split")
    )
    assert not built(split)[1].separate_passes
