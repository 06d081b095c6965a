"""Natural and plain adversarial training in float64, and what every objective's attack keeps to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.distributed import Place
from arat_fast.models import use_statistics
from arat_fast.objectives import (
    ARAT,
    ARREST,
    LBGAT,
    MART,
    TRADES,
    AdversarialTraining,
    NaturalTraining,
    Objective,
)
from arat_fast.objectives.normal_start import START_STD
from arat_fast.training.step import adversarial_batch, make_train_step, own_start

ATTACK = PGD(eps=0.1, alpha=0.03, num_steps=4)


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(TinyNet(), seed).double()


def images(samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(1)
    x = torch.rand(samples, 3, 8, 8, generator=source, dtype=torch.float64)
    noise = 0.1 * torch.randn(x.shape, generator=source, dtype=torch.float64)
    return x, (x + noise).clamp(0, 1), torch.randint(0, 4, (samples,), generator=source)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    rows = zip(logits, y, strict=True)
    return -torch.stack([(a[k].exp() / a.exp().sum()).log() for a, k in rows]).mean()


@pytest.mark.parametrize("adversarial", [False, True])
def test_one_cross_entropy_on_one_kind_of_image(adversarial: bool) -> None:
    model = network()
    plain = copy.deepcopy(model)
    x, x_adv, y = images()
    objective = AdversarialTraining() if adversarial else NaturalTraining()
    x.requires_grad_()
    x_adv.requires_grad_()
    output = objective(model, x, x_adv, y)
    used, unused = (x_adv, x) if adversarial else (x, x_adv)
    expected = cross_entropy(plain(used.detach()), y)
    got = torch.autograd.grad(output.loss, list(model.parameters()), retain_graph=True)
    truth = torch.autograd.grad(expected, list(plain.parameters()))
    assert float((output.loss - expected).detach().abs()) <= 1e-12
    for a, b in zip(got, truth, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1e-3, float(b.abs().max()))
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    reached = torch.autograd.grad(output.loss, (used, unused), allow_unused=True)
    assert reached[0] is not None and reached[1] is None
    assert list(output.terms) == ["ce_adv" if adversarial else "ce_clean"]
    assert (output.logits_clean is None) == adversarial
    assert (output.logits_adv is None) != adversarial
    assert objective.needs_attack == adversarial


BUILDERS: dict[str, Callable[[nn.Module], Objective]] = {
    "at": lambda model: AdversarialTraining(),
    "trades": lambda model: TRADES(),
    "mart": lambda model: MART(),
    "lbgat": lambda model: LBGAT(randomize(TinyNet(), 4).to(next(model.parameters()).dtype)),
    "arrest": lambda model: ARREST(model, ATTACK, ("bn2",)),
}


@pytest.mark.parametrize("name", ["mart", "trades", "lbgat"])
def test_attack_step_by_step(name: str) -> None:
    """Eval mode, a normal start that is not clamped, then sign steps, projection and clamp."""
    model = network()
    objective = BUILDERS[name](model)
    x, _, y = images()
    noise = START_STD * torch.empty_like(x).normal_(generator=generator(7))
    with use_statistics(model, "running"):
        clean = model(x).softmax(dim=1).detach()
        expected = x + noise
        for _ in range(4):
            expected.requires_grad_()
            logits = model(expected)
            if name == "mart":
                loss = len(y) * cross_entropy(logits, y)
            else:
                loss = (clean * (clean.log() - logits.log_softmax(dim=1))).sum()
            (gradient,) = torch.autograd.grad(loss, expected)
            moved = expected.detach() + 0.03 * gradient.sign()
            expected = torch.min(torch.max(moved, x - 0.1), x + 0.1).clamp(0, 1)
    _, got = adversarial_batch(model, objective, ATTACK, x, y, generator=generator(7))
    assert (got - expected).abs().max() <= 1e-12
    assert (got - x).abs().max() > 0.05


@pytest.mark.parametrize("name", ["at", "arrest"])
def test_no_attack_of_its_own(name: str) -> None:
    model = network()
    objective = BUILDERS[name](model)
    x, _, y = images()
    assert objective.own_attack(ATTACK) is ATTACK
    assert own_start(objective, x, Place(0, len(x)), None) is None
    assert objective.attack_loss(model, x, y) is None


@pytest.mark.parametrize("name", BUILDERS)
def test_the_attack_leaves_the_network_as_it_is(name: str) -> None:
    model = network()
    objective = BUILDERS[name](model)
    before = copy.deepcopy(model.state_dict())
    x, _, y = images()
    adversarial_batch(model, objective, ATTACK, x, y, generator=generator(1))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for m in (model, objective) for p in m.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "passes"),
    [("trades", "clean adv clean"), ("mart", "clean adv"), ("lbgat", "adv clean")],
)
def test_passes_of_the_authors_code(name: str, passes: str) -> None:
    """Their number and order, which the running statistics keep."""
    model = network()
    plain = copy.deepcopy(model)
    x, x_adv, y = images()
    BUILDERS[name](model)(model, x, x_adv, y)
    for kind in passes.split():
        plain(x if kind == "clean" else x_adv)
    for (key, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", [*BUILDERS, "arat", "arat, separate passes"])
def test_passes_are_those_of_the_training(name: str) -> None:
    model = network()
    if name in BUILDERS:
        objective = BUILDERS[name](model)
    else:
        separate = name.endswith("passes")
        objective = ARAT(model, ["bn2"], (3, 8, 8), separate_passes=separate).double()
    x, x_adv, y = images()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    objective(model, x, x_adv, y)
    expected = objective.passes(model, x, x_adv)
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_bf16_has_the_gradients_of_float32(name: str) -> None:
    """Passes without gradients share the autocast context with those that have them."""
    x, _, y = images(16)
    grads: list[Tensor] = []
    for precision in (torch.float32, torch.bfloat16):
        model = network().float()
        objective = BUILDERS[name](model)
        trained = [p for m in (model, objective) for p in m.parameters() if p.requires_grad]
        step = make_train_step(
            model,
            objective,
            PGD(eps=0.1, alpha=0.1, num_steps=1),
            torch.optim.SGD(trained, lr=0.0),
            precision=precision,
            generator=generator(3),
        )
        step(x.float(), y)
        assert all(p.grad is not None for p in trained)
        # The bias before a BatchNorm has no gradient but rounding; so has the convolution's here.
        grads.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.95
