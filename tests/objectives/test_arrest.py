"""ARREST against its formula in float64: values, gradients, what is replayed, what is frozen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.models import use_statistics
from arat_fast.objectives import ARREST
from arat_fast.objectives.arrest import angular_distance
from arat_fast.training.step import make_train_step

LAYERS = ("bn2",)
ATTACK = PGD(eps=0.1, alpha=0.03, num_steps=2)


def networks() -> tuple[nn.Module, nn.Module]:
    """The natural network, and one that has moved away from it."""
    torch.manual_seed(3)
    natural = randomize(TinyNet(), 3).double().eval()
    moved = copy.deepcopy(natural).train()
    source = generator(5)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return natural, moved


def images(samples: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(1)
    x = torch.rand(samples, 3, 8, 8, generator=source, dtype=torch.float64)
    noise = 0.1 * torch.randn(x.shape, generator=source, dtype=torch.float64)
    return x, (x + noise).clamp(0, 1), torch.randint(0, 4, (samples,), generator=source)


def representation(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the pooled feature before the classifier, layer by layer."""
    hidden = model.bn1(model.conv1(x)).relu()
    features = model.bn2(model.conv2(hidden))
    return model.head(features.mean(dim=(2, 3))), features.relu().mean(dim=(2, 3))


def angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.arccos((a @ b) / (a @ a).sqrt() / (b @ b).sqrt()) / math.pi


def clean_angles(model: nn.Module, natural: nn.Module, x: Tensor) -> list[float]:
    with torch.no_grad(), use_statistics(model, "running"):
        pairs = zip(representation(model, x)[1], representation(natural, x)[1], strict=True)
        return [float(angle(a, b)) for a, b in pairs]


def median_threshold(model: nn.Module, natural: nn.Module, x: Tensor) -> float:
    """A threshold between the fourth and the fifth of eight angles: half are replayed."""
    ordered = sorted(clean_angles(model, natural, x))
    assert ordered[4] - ordered[3] > 1e-6
    return (ordered[3] + ordered[4]) / 2


@pytest.mark.parametrize("replay", ["all", "half", "none"])
def test_loss_and_gradients_are_those_of_the_formula(replay: str) -> None:
    natural, model = networks()
    x, x_adv, y = images()
    half = median_threshold(model, natural, x)
    threshold = {"all": 0.0, "half": half, "none": 1.0}[replay]
    objective = ARREST(natural, ATTACK, LAYERS, distillation=7.0, replay=threshold)
    objective.generator = generator(9)
    objective.train()
    plain = copy.deepcopy(model)
    noisy = ATTACK.start(x, generator(9)).clamp(0, 1)
    moved = [a > threshold for a in clean_angles(plain, natural, x)]
    assert sum(moved) == {"all": 8, "half": 4, "none": 0}[replay]
    used = torch.stack([n if m else a for n, m, a in zip(noisy, moved, x_adv, strict=True)])
    logits, h = representation(plain, used)
    target = representation(natural, x)[1].detach()
    expected = torch.zeros((), dtype=torch.float64)
    for row, a, b, label in zip(logits, h, target, y, strict=True):
        expected = expected - row.log_softmax(0)[label] + 7.0 * angle(a, b)
    expected = expected / len(y)
    expected.backward()

    output = objective(model, x, x_adv, y)
    output.loss.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    assert float((sum(output.terms.values()) - output.loss).detach().abs()) <= 1e-12
    assert list(output.terms) == ["ce_adv", "distillation"]
    assert float(output.metrics["replayed"]) == sum(moved) / 8
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-10 * max(1e-3, float(b.grad.abs().max())), name
    # Measuring the angles moved no running statistics, training on x' moved them once.
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_the_natural_network_stays_as_it_is() -> None:
    natural, _ = networks()
    model = copy.deepcopy(natural).train()
    objective = ARREST(model, ATTACK, LAYERS)
    assert not any(p.requires_grad for p in objective.parameters())
    frozen = copy.deepcopy(objective.natural.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    step = make_train_step(model, objective, ATTACK, optimizer, generator=generator(2))
    x, _, y = images()
    for _ in range(3):
        step(x, y)
    assert not objective.natural.training
    assert not any(module.training for module in objective.natural.modules())
    assert all(p.grad is None for p in objective.natural.parameters())
    for name, tensor in objective.natural.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    assert not torch.equal(model.state_dict()["conv1.weight"], frozen["conv1.weight"])
    objective.adopt(model)
    assert torch.equal(objective.natural.conv1.weight, model.conv1.weight)


def test_no_gradient_reaches_the_natural_representation() -> None:
    natural, model = networks()
    objective = ARREST(natural, ATTACK, LAYERS, replay=1.0)
    x, x_adv, y = images()
    x.requires_grad_()
    x_adv.requires_grad_()
    output = objective(model, x, x_adv, y)
    clean, adv = torch.autograd.grad(output.loss, (x, x_adv), allow_unused=True)
    # The clean images reach the loss through the natural representation only.
    assert clean is None and adv is not None and adv.abs().max() > 0


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_replayed_images_lie_in_the_ball_and_in_the_range(norm: str) -> None:
    natural, model = networks()
    attack = PGD(eps=0.3, alpha=0.1, num_steps=1, norm=norm, random_start=False)  # type: ignore[arg-type]
    objective = ARREST(natural, attack, LAYERS, replay=0.0)
    objective.generator = generator(4)
    x, x_adv, y = images()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    objective(model, x, x_adv, y)
    used = seen[-1]
    delta = (used - x).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)
    assert size.max() <= 0.3 * (1 + 1e-9) and size.min() > 0
    assert used.min() >= 0 and used.max() <= 1
    other = ARREST(natural, attack, LAYERS, replay=0.0)
    other.generator = generator(4)
    other(model, x, x_adv, y)
    assert torch.equal(seen[-1], used)


def test_at_the_start_nothing_has_moved() -> None:
    """The network is the natural one: nothing is replayed, and the gradient is finite."""
    natural, _ = networks()
    model = copy.deepcopy(natural)
    objective = ARREST(natural, ATTACK, LAYERS, replay=1e-6)
    x, _, y = images()
    with use_statistics(model, "running"):
        output = objective(model, x, x, y)
    assert float(output.metrics["replayed"]) == 0
    assert float(output.terms["distillation"].detach()) <= 1e-12
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_angular_distance() -> None:
    a = torch.tensor([[2.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 0], [3, 0], [-2, 0], [1, 0]], dtype=torch.float64)
    distance = angular_distance(a, b)
    torch.testing.assert_close(distance, torch.tensor([0, 0.5, 1, 0.25], dtype=torch.float64))
    distance.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_bad_options() -> None:
    natural, _ = networks()
    for options, message in (
        ({"distillation": -1.0}, "distillation must be >= 0, got -1.0"),
        ({"replay": float("nan")}, "replay must be >= 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ARREST(natural, ATTACK, LAYERS, **options)  # type: ignore[arg-type]  # keywords
