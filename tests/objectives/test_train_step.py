"""The training step in a user's own loop, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from networks import generator
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.models import MODELS, convert_split_batch_norm, create_model, use_statistics
from arat_fast.objectives import ARAT, AdversarialTraining, NaturalTraining
from arat_fast.training.step import TrainStep, make_train_step


def batch(samples: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    source = generator(1)
    x = torch.rand(samples, 3, size, size, generator=source)
    return x, torch.randint(0, 4, (samples,), generator=source)


def step_for(model: nn.Module, lr: float = 0.05, seed: int = 2, **options: object) -> TrainStep:
    torch.manual_seed(0)
    objective = ARAT(model, MODELS["resnet8"].regularized_layers, (3, 8, 8))
    objective.start_epoch(0.5)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return make_train_step(
        model,
        objective,
        PGD(num_steps=2),
        optimizer,
        generator=generator(seed),
        **options,  # type: ignore[arg-type]  # forwarded
    )


def resnet8() -> nn.Module:
    torch.manual_seed(1)
    return create_model("resnet8", 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "got 1 NaN"), (1.01, "to 1.01"), (-0.5, "from -0.5"), (float("inf"), "inf")],
)
def test_a_bad_image_changes_nothing(value: float, message: str) -> None:
    model = resnet8()
    step = step_for(model)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    x[3, 1, 2, 2] = value
    with pytest.raises(ValueError, match=message) as error:
        step(x, y)
    assert "\n" not in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    step_for(model, check_inputs=False)(batch()[0], y)


def test_metrics_and_learning() -> None:
    model = resnet8()
    step = step_for(model)
    x, y = batch()
    first = step(x, y)
    layers = [f"invariance/{n}" for n in MODELS["resnet8"].regularized_layers]
    terms = ["ce_adv", "ce_clean", *layers]
    assert list(first) == ["loss", *terms, "accuracy_clean", "accuracy_adv"]
    assert all(value.ndim == 0 and not value.requires_grad for value in first.values())
    torch.testing.assert_close(first["loss"], torch.stack([first[n] for n in terms]).sum())
    for _ in range(8):
        last = step(x, y)
    assert last["loss"] < first["loss"]
    assert last["accuracy_clean"] >= first["accuracy_clean"]


def test_same_seed_same_numbers() -> None:
    x, y = batch()
    states = []
    for seed in (5, 5, 6):
        model = resnet8()
        step = step_for(model, seed=seed)
        step(x, y)
        step(x, y)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_the_step_trains_in_train_mode_without_gradients_left_over() -> None:
    model = resnet8().eval()
    step = step_for(model)
    x, y = batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    step(x, y)
    assert all(m.training for m in model.modules())
    assert all(p.grad is not None and p.grad.abs().max() < 1e5 for p in model.parameters())


def test_batch_statistics_move_once_per_step() -> None:
    model = resnet8()
    x, y = batch()
    step_for(model)(x, y)
    assert model.get_buffer("bn1.num_batches_tracked").tolist() == [1, 1]


@pytest.mark.parametrize("noisy_clean", [False, True])
def test_noisy_clean_moves_the_clean_images_and_the_centre(noisy_clean: bool) -> None:
    model = resnet8()
    x, y = batch()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach().clone()))
    step = step_for(model, noisy_clean=noisy_clean)
    seen.clear()
    step(x, y)
    clean, adv = seen[-1].chunk(2)
    eps = step.attack.eps
    assert ((clean - x).abs().max() > 0) == noisy_clean
    assert (clean - x).abs().max() <= eps * (1 + 1e-6)
    inside = (x > 2 * eps) & (x < 1 - 2 * eps)
    assert (adv - clean)[inside].abs().max() <= eps * 1.00001
    assert ((adv - x).abs().max() > eps * 1.01) == noisy_clean


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_may_leave_the_start_to_the_attack(accumulate: int) -> None:
    """In the steps in which it has none of its own."""

    class Sometimes(AdversarialTraining):
        asked = 0

        def attack_noise(self, shape: tuple[int, ...], **options: object) -> None:
            assert shape == (8, 3, 8, 8) and options["dtype"] == torch.float32
            self.asked += 1

    weights = []
    for objective in (AdversarialTraining(), Sometimes()):
        torch.manual_seed(1)
        model = create_model("resnet8", 4, norm="shared")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = make_train_step(
            model,
            objective,
            PGD(num_steps=1),
            optimizer,
            accumulate=accumulate,
            generator=generator(3),
        )
        step(*batch())
        weights.append(model.state_dict())
    assert isinstance(objective, Sometimes) and objective.asked == 1
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_natural_training_needs_no_attack() -> None:
    model = create_model("resnet8", 4, norm="shared")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    natural = make_train_step(model, NaturalTraining(), PGD(num_steps=3), optimizer)
    assert set(natural(x, y)) == {"loss", "ce_clean", "accuracy_clean"} and len(calls) == 1
    adversarial = make_train_step(model, AdversarialTraining(), PGD(num_steps=3), optimizer)
    assert set(adversarial(x, y)) == {"loss", "ce_adv", "accuracy_adv"} and len(calls) == 5


def test_bf16_keeps_losses_and_images_float32() -> None:
    model = resnet8()
    step = step_for(model, precision=torch.bfloat16)
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    model.register_forward_hook(lambda _m, args, out: dtypes.append((args[0].dtype, out.dtype)))
    metrics = step(*batch())
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert all(v.dtype == torch.float32 and v.isfinite() for v in metrics.values())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_buffer("bn1.running_mean").dtype == torch.float32
    with pytest.raises(ValueError, match="got torch.float16"):
        step_for(model, precision=torch.float16)


def test_a_torchvision_network_in_your_own_loop() -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(torchvision.models.resnet18(num_classes=4))
    layers = ("layer4.0.bn2", "layer4.1", "avgpool")
    objective = ARAT(model, layers, (3, 32, 32), gamma=1.0)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    step = make_train_step(model, objective, PGD(num_steps=1), optimizer)
    x, y = batch(size=32)
    before = copy.deepcopy(model.state_dict())
    objective.start_epoch(0.5)
    losses = [float(step(x, y)["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert tensor.double().isfinite().all()
        assert not torch.equal(tensor, before[name]), name
    with torch.no_grad(), use_statistics(model, "running"):
        assert model(x).shape == (8, 4)
