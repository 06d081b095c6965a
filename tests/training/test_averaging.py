"""SWA and EMA against their definitions; BatchNorm statistics re-estimated on both branches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import generator
from torch import Tensor, nn

from arat_fast.attacks import PGD, RandomStart
from arat_fast.config import AverageConfig
from arat_fast.data.batches import Batch
from arat_fast.models import SplitBatchNorm2d, convert_split_batch_norm
from arat_fast.objectives import (
    ARAT,
    LBGAT,
    MART,
    TRADES,
    AdversarialTraining,
    NaturalTraining,
    Objective,
    ObjectiveOutput,
)
from arat_fast.training.averaging import WeightAverage, refresh_batch_norm
from arat_fast.training.step import adversarial_batch

ATTACK = PGD(eps=0.3, alpha=0.3, num_steps=1)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )
    return convert_split_batch_norm(model).double()


def trained(average: WeightAverage, steps: range) -> list[dict[str, Tensor]]:
    """Move the weights and the statistics at every step; what they were at each."""
    states = []
    for step in steps:
        source = generator(step)
        for value in [*average.trained.parameters(), *average.trained.buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=source, dtype=value.dtype)
                value.data += 0.1 * noise.abs()
            else:
                value += 1
        average.update(step)
        states.append(copy.deepcopy(average.trained.state_dict()))
    return states


def batches() -> list[Batch]:
    source = generator(3)
    return [
        Batch(
            torch.rand(n, 1, 6, 6, generator=source, dtype=torch.float64),
            torch.randint(5, (n,), generator=source),
        )
        for n in (8, 8, 3)
    ]


def moments(passes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance over batches, each of which is normalised by itself."""
    total = sum(len(x) for x in passes)
    means = [len(x) * x.mean((0, 2, 3)) for x in passes]
    variances = [len(x) * x.var((0, 2, 3)) for x in passes]
    return torch.stack(means).sum(0) / total, torch.stack(variances).sum(0) / total


def test_swa_is_the_mean_of_the_taken_weights() -> None:
    average = WeightAverage(AverageConfig("swa", every=3), network(), start_step=4)
    states = trained(average, range(14))
    assert average.num_averaged == 4 and not average.statistics_fresh
    assert average.model is not None
    for name, value in average.model.named_parameters():
        taken = torch.stack([states[step][name] for step in (4, 7, 10, 13)])
        torch.testing.assert_close(value.data, taken.mean(0))


def test_ema_of_parameters_and_statistics() -> None:
    average = WeightAverage(AverageConfig("ema", decay=0.7), network(), start_step=0)
    states = trained(average, range(4))
    assert average.model is not None and average.statistics_fresh
    assert average.share_of_first == pytest.approx(0.7**3)
    for name, value in average.model.state_dict().items():
        expected = states[0][name]
        for state in states[1:]:
            whole = not expected.is_floating_point()
            expected = state[name] if whole else 0.7 * expected + 0.3 * state[name]
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("kind", ["none", "swa", "ema"])
def test_state_goes_on_exactly(kind: str) -> None:
    config = AverageConfig(kind, every=2)  # type: ignore[arg-type]  # one of the three
    whole, first = (WeightAverage(config, network(), 0) for _ in range(2))
    trained(whole, range(6))
    trained(first, range(3))
    second = WeightAverage(config, first.trained, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    trained(second, range(3, 6))
    assert (whole.model is None) == (second.model is None) == (kind == "none")
    if whole.model is not None and second.model is not None:
        state = second.model.state_dict()
        assert all(torch.equal(v, state[n]) for n, v in whole.model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in second.model.parameters())


def test_refresh_fills_both_branches() -> None:
    model, data = network(), batches()
    layer = model[1]
    assert isinstance(layer, SplitBatchNorm2d)
    layer.running_mean.fill_(9)
    layer.running_var.fill_(9)
    model.eval()
    inputs: dict[str, list[Tensor]] = {"clean": [], "adv": []}
    model[0].register_forward_hook(
        lambda module, args, output: (
            inputs[layer.branch].append(output.detach()) if layer.statistics is None else None
        )
    )
    attack = PGD(eps=0.2, alpha=0.1, num_steps=2)
    refresh_batch_norm(model, data, AdversarialTraining(), attack, generator(0))
    assert not model.training and layer.momentum == 0.1
    for row, branch in enumerate(("clean", "adv")):
        mean, var = moments(inputs[branch])
        torch.testing.assert_close(layer.running_mean[row], mean)
        torch.testing.assert_close(layer.running_var[row], var)
    assert not torch.allclose(layer.running_mean[0], layer.running_mean[1])


@pytest.mark.parametrize("bn", ["running", "batch_update"])
def test_refresh_does_not_depend_on_the_statistics_of_the_attack(bn: str) -> None:
    results = []
    for mode in ("batch", bn):
        model = network()
        attack = PGD(eps=0.2, alpha=0.1, num_steps=2, bn=mode)  # type: ignore[arg-type]
        refresh_batch_norm(model, batches(), AdversarialTraining(), attack, generator(0))
        results.append(model.state_dict())
    assert int(results[0]["1.num_batches_tracked"][1]) == len(batches())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Both(Objective):
    """One of somebody's own, which trains on both kinds of images in one batch."""

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        loss = F.cross_entropy(model(torch.cat([x, x_adv])), y.repeat(2))
        return ObjectiveOutput(loss, {"ce": loss}, None, None)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        return [torch.cat([x, x_adv])]


def plain(split: bool = False) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 5)).double()
    return convert_split_batch_norm(model) if split else model


OBJECTIVES = [NaturalTraining(), AdversarialTraining(), TRADES(), MART(), LBGAT(None), Both()]


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, ARAT(plain(), ["0"], (1, 6, 6), predictor=False)],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_refresh_sees_what_the_training_sees(objective: Objective, split: bool) -> None:
    """The objective's own attack, on batch statistics, and its passes, each by itself."""
    model = plain(split).train()
    draws, deployed, clean = generator(4), [], []
    for x, y in batches():
        start = objective.random_start(ATTACK, x, draws)
        x, x_adv = adversarial_batch(model, objective, ATTACK, x, y, start, bn="batch")
        deployed += objective.passes(model, x, x_adv)
        clean.append(x)
    refresh_batch_norm(model, batches(), objective, ATTACK, generator(4))
    state = model.state_dict()
    for row, passes in enumerate((clean, deployed) if split else (deployed,)):
        mean, var = moments(passes)
        index = (row,) if split else ()
        torch.testing.assert_close(state["0.running_mean"][index], mean)
        torch.testing.assert_close(state["0.running_var"][index], var)
