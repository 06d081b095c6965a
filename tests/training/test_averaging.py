"""SWA and EMA against their definitions; BatchNorm statistics re-estimated on both branches."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import generator
from rich.console import Console
from tiny import tiny_config
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.config import AverageConfig
from arat_fast.data.batches import Batch
from arat_fast.display import Display
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
from arat_fast.run.loop import Trainer
from arat_fast.training.averaging import WeightAverage, refresh_batch_norm
from arat_fast.training.step import adversarial_batch

ATTACK = PGD(eps=0.3, alpha=0.3, num_steps=1)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )
    return convert_split_batch_norm(model).double()


def perturbed(model: nn.Module, step: int) -> nn.Module:
    generator = torch.Generator().manual_seed(step)
    result = copy.deepcopy(model)
    for value in [*result.parameters(), *result.buffers()]:
        if value.is_floating_point():
            value.data += (
                0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype).abs()
            )
    return result


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        Batch(
            torch.rand(n, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for n in (8, 8, 3)
    ]


def test_swa_is_the_mean_of_the_taken_weights() -> None:
    average = WeightAverage(AverageConfig("swa", every=3), start_step=4)
    base, taken = network(0), []
    for step in range(14):
        model = perturbed(base, step)
        average.update(model, step)
        if step in (4, 7, 10, 13):
            taken.append(model)
    assert average.num_averaged == 4 and not average.statistics_fresh
    assert average.model is not None
    for values in zip(average.model.parameters(), *(m.parameters() for m in taken), strict=True):
        torch.testing.assert_close(values[0].data, torch.stack(values[1:]).mean(0).data)


def test_ema_of_parameters_and_statistics() -> None:
    average = WeightAverage(AverageConfig("ema", every=1, decay=0.7), start_step=0)
    models = [perturbed(network(0), step) for step in range(4)]
    for step, model in enumerate(models):
        average.update(model, step)
    assert average.model is not None and average.statistics_fresh
    for name, value in average.model.state_dict().items():
        if not value.is_floating_point():
            continue
        expected = models[0].state_dict()[name]
        for model in models[1:]:
            expected = 0.7 * expected + 0.3 * model.state_dict()[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("decay", "said"), [(0.9, True), (0.2, False)])
def test_a_young_average_is_pointed_out(tmp_path: Path, decay: float, said: bool) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = tiny_config(epochs=1, kind="ema", start=0.0, decay=decay, every=1)
    Trainer(config, tmp_path, display=Display(console)).run()
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    # Three of four steps came after the first one.
    assert ("those after step 1 still count 73 %" in shown) == said
    assert ("young average" in shown) == said


def test_no_average() -> None:
    average = WeightAverage(AverageConfig("none"), start_step=0)
    average.update(network(0), 0)
    assert average.model is None and average.state_dict()["model"] is None


def test_state_goes_on_exactly() -> None:
    config = AverageConfig("swa", every=1)
    whole, first = WeightAverage(config, 0), WeightAverage(config, 0)
    models = [perturbed(network(0), step) for step in range(5)]
    for step, model in enumerate(models):
        whole.update(model, step)
        if step < 3:
            first.update(model, step)
    second = WeightAverage(config, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()), network(1))
    for step in (3, 4):
        second.update(models[step], step)
    assert whole.model is not None and second.model is not None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_refresh_fills_both_branches() -> None:
    model, data = network(0), batches()
    attack = PGD(eps=0.2, alpha=0.1, num_steps=2)
    layer = model[1]
    assert isinstance(layer, SplitBatchNorm2d)
    layer.running_mean.fill_(9)
    layer.running_var.fill_(9)
    model.eval()
    inputs: dict[str, list[torch.Tensor]] = {"clean": [], "adv": []}
    conv = model[0]
    conv.register_forward_hook(
        lambda module, args, output: (
            inputs[layer.branch].append(output.detach()) if layer.statistics is None else None
        )
    )
    refresh_batch_norm(model, data, AdversarialTraining(), attack, generator(0))
    assert not model.training and layer.momentum == 0.1
    total = sum(len(x) for x, _ in data)
    for row, branch in enumerate(("clean", "adv")):
        mean = sum(len(v) * v.mean((0, 2, 3)) for v in inputs[branch]) / total
        var = sum(len(v) * v.var((0, 2, 3)) for v in inputs[branch]) / total
        torch.testing.assert_close(layer.running_mean[row], mean)
        torch.testing.assert_close(layer.running_var[row], var)
    assert not torch.allclose(layer.running_mean[0], layer.running_mean[1])


@pytest.mark.parametrize("bn", ["running", "batch_update"])
def test_refresh_does_not_depend_on_the_statistics_of_the_attack(bn: str) -> None:
    results = []
    for mode in ("batch", bn):
        model = network(0)
        attack = PGD(eps=0.2, alpha=0.1, num_steps=2, bn=mode)  # type: ignore[arg-type]
        refresh_batch_norm(model, batches(), AdversarialTraining(), attack, generator(0))
        results.append(model.state_dict())
    assert int(results[0]["1.num_batches_tracked"][1]) == len(batches())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_refresh_of_a_shared_batch_norm_sees_the_mixture() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 5)).double()
    objective = ARAT(model, ["0"], (1, 6, 6), predictor=False)
    seen: list[int] = []
    model[0].register_forward_hook(
        lambda module, args, output: (
            seen.append(len(args[0])) if not torch.is_grad_enabled() else None
        )
    )
    attack = PGD(eps=0.3, alpha=0.3, num_steps=1)
    refresh_batch_norm(model, batches(), objective, attack)
    assert seen == [2 * len(x) for x, _ in batches()]


def test_refresh_of_an_ordinary_network_sees_adversarial_examples() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 5)).double()
    data = batches()
    refresh_batch_norm(model, data, NaturalTraining(), ATTACK)
    total = sum(len(x) for x, _ in data)
    expected = sum(len(x) * x.mean((0, 2, 3)) for x, _ in data) / total
    torch.testing.assert_close(model[0].running_mean, expected)
    refresh_batch_norm(model, data, AdversarialTraining(), ATTACK)
    assert not torch.allclose(model[0].running_mean, expected)


class Both(Objective):
    """One of somebody's own, which trains on both kinds of images in one batch."""

    def forward(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveOutput:
        loss = F.cross_entropy(model(torch.cat([x, x_adv])), y.repeat(2))
        return ObjectiveOutput(loss, {"ce": loss}, None, None)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        return [torch.cat([x, x_adv])]


@pytest.mark.parametrize(
    "objective", [TRADES(), MART(), LBGAT(None), Both()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("split", [False, True])
def test_refresh_sees_what_the_training_sees(objective: Objective, split: bool) -> None:
    """The objective's own attack, on batch statistics, and its passes, each by itself."""
    layer = nn.BatchNorm2d(1)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(36, 5)).double()
    if split:
        model = convert_split_batch_norm(model)
    model.train()
    draws, expected, clean = generator(4), [], []
    for x, y in batches():
        x, x_adv = adversarial_batch(model, objective, ATTACK, x, y, generator=draws, bn="batch")
        expected += objective.passes(model, x, x_adv)
        clean.append(x)
    refresh_batch_norm(model, batches(), objective, ATTACK, generator(4))
    state = model.state_dict()
    for row, passes in enumerate((clean, expected) if split else (expected,)):
        total = sum(len(images) for images in passes)
        mean = sum(len(images) * images.mean((0, 2, 3)) for images in passes) / total
        var = sum(len(images) * images.var((0, 2, 3)) for images in passes) / total
        index = (row,) if split else ()
        torch.testing.assert_close(state["0.running_mean"][index], mean)
        torch.testing.assert_close(state["0.running_var"][index], var)


@pytest.mark.parametrize("fields", [{"start": 1.0}, {"every": 0}, {"decay": 1.0}])
def test_values_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"average.{next(iter(fields))}"):
        AverageConfig(**fields)  # type: ignore[arg-type]
