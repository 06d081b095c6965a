"""The fast step computes what the plain one computes."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Literal

import pytest
import torch
import torchvision
from networks import generator
from rich.console import Console
from tiny import tiny_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from arat_fast.attacks import PGD
from arat_fast.data.batches import ResidentBatches
from arat_fast.display import Display
from arat_fast.models import MODELS, convert_split_batch_norm, create_model
from arat_fast.models.layers import StemConv2d, protect_stem
from arat_fast.objectives import ARAT
from arat_fast.run.loop import Trainer
from arat_fast.training.graph import make_capturable
from arat_fast.training.step import TrainStep, make_train_step


def resident(num_samples: int = 24) -> ResidentBatches:
    images = torch.randint(256, (num_samples, 3, 8, 8), generator=generator(1), dtype=torch.uint8)
    labels = torch.randint(4, (num_samples,), generator=generator(2))
    return ResidentBatches(
        images, labels, tuple("abcd"), batch_size=8, shuffle=True, padding=1, flip=True
    )


def make_step(
    bn: Literal["batch", "running"] = "batch",
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> TrainStep:
    torch.manual_seed(0)
    model = create_model("resnet8", 4).to(dtype)
    objective = ARAT(model, MODELS["resnet8"].regularized_layers, (3, 8, 8)).to(dtype)
    objective.start_epoch(0.5)
    parameters = [*model.parameters(), *objective.parameters()]
    return make_train_step(
        model,
        objective,
        PGD(num_steps=3, bn=bn),
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        generator=generator(3),
        **options,  # type: ignore[arg-type]  # forwarded
    )


def batches(num: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    found = [batch for epoch in range(num) for batch in resident().epoch(epoch)]
    return [(x.to(dtype), y) for x, y in found[:num]]


def test_folding_changes_no_step() -> None:
    folded, plain = (make_step("running", torch.float64, fold=fold) for fold in (True, False))
    for x, y in batches(4, torch.float64):
        metrics, expected = folded(x, y), plain(x, y)
        for name, value in expected.items():
            assert abs(float(metrics[name] - value)) <= 1e-9 * max(1.0, abs(float(value))), name
    assert folded.folded_network is not None and plain.folded_network is None
    state = plain.model.state_dict()
    for name, tensor in folded.model.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=1e-9, atol=1e-10), name


def test_folding_leaves_other_attacks_alone() -> None:
    step = make_step("batch")
    step(*batches(1)[0])
    assert step.folded_network is None


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_from_indices_is_the_step_on_the_assembled_batch(bn: Literal["batch", "running"]) -> None:
    data = resident()
    by_index, by_batch = make_step(bn, assemble=data.assemble), make_step(bn)
    for epoch in range(2):
        for (index, draws), (x, y) in zip(
            data.epoch_indices(epoch), data.epoch(epoch), strict=True
        ):
            metrics, expected = by_index.from_indices(index, draws), by_batch(x, y)
            assert metrics.keys() == expected.keys()
            assert all(torch.equal(metrics[name], expected[name]) for name in metrics)
    expected_state = by_batch.model.state_dict()
    for name, tensor in by_index.model.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_bf16_follows_float32(bn: Literal["batch", "running"]) -> None:
    """Losses over 50 steps, same seeds.

    A bf16 forward pass is wrong by about 2^-9 per rounding; the loss, after some ten layers, by
    1e-2 relative. Training moves both runs apart, as two float32 runs from weights that differ by
    that rounding do: those set the budget.
    """
    plain, rounded = make_step(bn), make_step(bn)
    fast = make_step(bn, precision=torch.bfloat16)
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.copy_(parameter.bfloat16())
    losses: dict[str, list[float]] = {"plain": [], "rounded": [], "fast": []}
    for x, y in batches(50):
        for name, step in (("plain", plain), ("rounded", rounded), ("fast", fast)):
            losses[name].append(float(step(x, y)["loss"]))
    difference = {
        name: [abs(a - b) for a, b in zip(losses[name], losses["plain"], strict=True)]
        for name in ("rounded", "fast")
    }
    assert difference["fast"][0] <= 0.01 * losses["plain"][0]
    mean = {name: sum(values) / len(values) for name, values in difference.items()}
    level = sum(losses["plain"]) / len(losses["plain"])
    assert mean["fast"] <= 2 * mean["rounded"] + 0.01 * level
    assert losses["fast"][-1] < losses["fast"][0]


class _Casts(TorchDispatchMode):
    """Shapes of what is cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.name() == "aten::_to_copy" and kwargs.get("dtype") == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_weights_are_cast_once_a_step(bn: Literal["batch", "running"]) -> None:
    step = make_step(bn, precision=torch.bfloat16)
    x, y = batches(1)[0]
    step(x, y)
    with _Casts() as casts:
        step(x, y)
    # All but the stem's; with folding, once for the attack and once for the training pass.
    weights = [
        tuple(module.weight.shape)
        for module in step.model.modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, StemConv2d)
    ]
    assert len(weights) == 8
    for shape in set(weights):
        expected = weights.count(shape) * (2 if bn == "running" else 1)
        assert casts.shapes.count(shape) == expected, shape


def test_the_stem_of_any_network_keeps_the_perturbation() -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(torchvision.models.mobilenet_v3_small(num_classes=4))
    keys = list(model.state_dict())
    objective = ARAT(model, ["avgpool"], (3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make_train_step(model, objective, PGD(num_steps=1), optimizer, precision=torch.bfloat16)
    seen: list[Tensor] = []
    x = torch.rand(4, 3, 32, 32, generator=generator(1))
    step(x, torch.arange(4))
    stems = [name for name, m in model.named_modules() if isinstance(m, StemConv2d)]
    assert stems == ["features.0.0"] and list(model.state_dict()) == keys
    stem = model.get_submodule(stems[0])
    stem.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    step(x, torch.arange(4))
    # [x; x_adv] of the training pass: the image itself, not its rounding.
    assert seen[-1].dtype == torch.float32 and torch.equal(seen[-1][:4], x)


class TwoStems(nn.Module):
    """The image enters two convolutions; what follows them does not see it."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.one = conv(3, 8, 3, padding=1)
        self.two = nn.Conv2d(3, 8, 1)
        self.three = nn.Conv2d(8, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.5
        y: Tensor = self.fc(self.bn(self.three(self.one(x) + self.two(x))).mean((2, 3)))
        return y


class OwnConv2d(nn.Conv2d):
    pass


def test_every_stem_is_protected_and_others_are_refused() -> None:
    x = torch.rand(4, 3, 8, 8, generator=generator(1))
    model = TwoStems()
    protect_stem(model, x, torch.bfloat16)
    stems = [name for name, m in model.named_modules() if isinstance(m, StemConv2d)]
    assert stems == ["one", "two"]
    with pytest.raises(ValueError, match=r"enters one, a OwnConv2d.*--step\.precision float32"):
        protect_stem(TwoStems(OwnConv2d), x, torch.bfloat16)


def test_a_torchvision_network_with_the_folded_attack() -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(torchvision.models.resnet18(num_classes=4))
    objective = ARAT(model, ["layer4.1.bn1", "layer4.1.bn2"], (3, 32, 32), gamma=1.0)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.02)
    step = make_train_step(model, objective, PGD(num_steps=2, bn="running"), optimizer)
    objective.start_epoch(0.5)
    x = torch.rand(8, 3, 32, 32, generator=generator(1))
    y = torch.randint(4, (8,), generator=generator(2))
    losses = [float(step(x, y)["loss"]) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert step.folded_network is not None and len(step.folded_network.folded) == 20


def test_dropout_and_batch_norm_1d_train_in_the_first_step_too() -> None:
    """Folding shares them with the network; a resumed run folds in its first step."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 4), nn.BatchNorm1d(4))
    body = convert_split_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(body, head)
    objective = ARAT(model, ["0.1"], (3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make_train_step(model, objective, PGD(num_steps=1, bn="running"), optimizer)
    modes: list[bool] = []
    head[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    step(torch.rand(4, 3, 8, 8, generator=generator(1)), torch.arange(4))
    assert modes[-1] and modes.count(True) == 1
    assert int(head[3].num_batches_tracked) == 1


def test_requests_that_cannot_be_met_name_the_switch() -> None:
    with pytest.raises(ValueError, match=r"needs a GPU, got a model on cpu.*--step\.graph off"):
        make_step(graph="on")
    with pytest.raises(ValueError, match=r"float16 needs loss scaling.*--step\.precision bf16"):
        make_step(precision=torch.float16)
    with pytest.raises(ValueError, match='"auto", "on" or "off", got \'maybe\''):
        make_step(graph="maybe")
    assert make_step(graph="auto")(*batches(1)[0])["loss"] > 0


def test_out_of_memory_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    before = copy.deepcopy(step.model.state_dict())
    forward = ARAT.forward

    def limited(self: ARAT, model: nn.Module, x: Tensor, *rest: Tensor) -> object:
        output = forward(self, model, x, *rest)
        if len(x) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return output

    monkeypatch.setattr(ARAT, "forward", limited)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 8; the largest .* fits is 5 "):
        step(*batches(1)[0])
    for name, tensor in step.model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_learning_rates_become_tensors_where_a_graph_reads_them() -> None:
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 0.25}]
    sgd = torch.optim.SGD(groups, momentum=0.9)
    rates = make_capturable(sgd, torch.device("cpu"))
    assert [group["lr"] for group in sgd.param_groups] == rates
    for rate, value in zip(rates, (0.125, 1.0), strict=True):
        rate.fill_(value)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    sgd.step()
    assert weights[0].tolist() == [0.875] * 3 and weights[1].tolist() == [0.0] * 2
    adam = torch.optim.Adam(weights)
    make_capturable(adam, torch.device("cpu"))
    assert adam.param_groups[0]["capturable"] is True
    with pytest.raises(ValueError, match=r"LBFGS cannot be captured.*--step\.graph off"):
        make_capturable(torch.optim.LBFGS(weights), torch.device("cpu"))


def test_a_run_gives_its_graphs_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(epochs=1)
    trainer = Trainer(config, tmp_path, display=Display(Console(quiet=True)))
    steps = []
    monkeypatch.setattr(trainer.train_step, "forget", lambda: steps.append(trainer.step))
    trainer.run()
    assert steps == [trainer.total_steps]


def test_a_run_says_what_was_folded(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    config = dataclasses.replace(config, attack=dataclasses.replace(config.attack, bn="running"))
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    summary = Trainer(config, tmp_path / "run", display=display).run()
    assert "9 BatchNorm layers folded into convolutions, 0 affine maps" in said.getvalue()
    assert summary["folded_batch_norms"] == 9
    assert summary["kernels"]["frozen_affine"] == "reference"


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_a_run_with_another_objective(tmp_path: Path, name: Literal["trades", "mart"]) -> None:
    config = tiny_config(epochs=1, kind="swa", start=0.0, every=1)
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, name=name, beta=2.0)
    )
    display = Display(Console(quiet=True))
    summary = Trainer(config, tmp_path / "run", display=display).run()
    assert summary["objective"] == name and summary["folded_batch_norms"] == 9
    assert "random_start" not in summary["kernels"]
    assert ("cross_entropy_grad" in summary["kernels"]) == (name == "mart")
