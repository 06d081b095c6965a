"""LBGAT against its formula, sample by sample, in float64: values, gradients, attack, branches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.distributed import Place
from arat_fast.models import convert_split_batch_norm
from arat_fast.objectives import LBGAT, TRADES
from arat_fast.objectives.normal_start import START_STD
from arat_fast.saved import export_plain
from arat_fast.training.step import adversarial_batch, make_train_step, own_start


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(TinyNet(), seed).double()


def images(samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(1)
    x = torch.rand(samples, 3, 8, 8, generator=source, dtype=torch.float64)
    noise = 0.1 * torch.randn(x.shape, generator=source, dtype=torch.float64)
    return x, (x + noise).clamp(0, 1), torch.randint(0, 4, (samples,), generator=source)


def formula(adv: Tensor, clean: Tensor, guide: Tensor, y: Tensor, alpha: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, c, g, label in zip(adv, clean, guide, y, strict=True):
        p, q = c.exp() / c.exp().sum(), a.exp() / a.exp().sum()
        squares = sum((a[k] - g[k]) ** 2 for k in range(len(g))) / len(g)
        entropy = -(g[label].exp() / g.exp().sum()).log()
        total = total + squares + entropy + alpha * (p * (p / q).log()).sum()
    return total / len(y)


def assert_same_gradients(got: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        # A bias before a BatchNorm has no gradient but rounding.
        assert (a.grad - b.grad).abs().max() <= 1e-10 * max(1e-3, float(b.grad.abs().max())), name
    for (name, a), b in zip(got.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_loss_gradients_and_statistics_are_those_of_the_formula(alpha: float) -> None:
    model, guide = network(3), network(4)
    plain, plain_guide = copy.deepcopy(model), copy.deepcopy(guide)
    x, x_adv, y = images()
    output = LBGAT(guide, alpha)(model, x, x_adv, y)
    output.loss.backward()
    adv, clean, guiding = plain(x_adv), plain(x), plain_guide(x)
    expected = formula(adv, clean, guiding, y, alpha)
    expected.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    assert list(output.terms) == ["mse", "ce_guide"] + ["kl"] * (alpha > 0)
    assert float((sum(output.terms.values()) - output.loss).detach().abs()) <= 1e-12
    torch.testing.assert_close(output.logits_adv, adv)
    torch.testing.assert_close(output.logits_clean, clean)
    # The running statistics too: the adversarial images pass first.
    assert_same_gradients(model, plain)
    assert_same_gradients(guide, plain_guide)


def test_where_gradients_reach() -> None:
    """The distance moves both networks, the labels the guide alone, the divergence f alone."""
    model, guide = network(3), network(4)
    x, x_adv, y = images()
    terms = LBGAT(guide, 6.0)(model, x, x_adv, y).terms
    ours, theirs = list(model.parameters()), list(guide.parameters())
    reached = {
        name: tuple(
            any(
                g is not None
                for g in torch.autograd.grad(term, part, retain_graph=True, allow_unused=True)
            )
            for part in (ours, theirs)
        )
        for name, term in terms.items()
    }
    assert reached == {"mse": (True, True), "ce_guide": (False, True), "kl": (True, False)}


def test_the_clean_branch_as_guide() -> None:
    """Distillation from the clean branch: two networks that share all but their BatchNorm."""
    torch.manual_seed(3)
    model = convert_split_batch_norm(TinyNet())
    randomize(model, 3).double()
    clean_net, adv_net = export_plain(model, "clean"), export_plain(model, "adv")
    x, x_adv, y = images()
    output = LBGAT(None, 6.0)(model, x, x_adv, y)
    output.loss.backward()
    expected = formula(adv_net(x_adv), adv_net(x), clean_net(x), y, 6.0)
    expected.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    pairs = zip(clean_net.named_parameters(), adv_net.parameters(), strict=True)
    for (name, clean), adv in pairs:
        assert clean.grad is not None and adv.grad is not None
        grad = model.get_parameter(name).grad
        assert grad is not None
        split = grad.shape != clean.grad.shape
        whole = torch.stack([clean.grad, adv.grad]) if split else clean.grad + adv.grad
        assert (grad - whole).abs().max() <= 1e-10 * max(1e-3, float(whole.abs().max())), name


def test_the_attack_is_that_of_trades_whatever_alpha() -> None:
    model = network(3)
    x, _, y = images()
    attack = PGD(eps=0.1, alpha=0.03, num_steps=3)
    results = []
    for objective in (LBGAT(network(4), 0.0), TRADES()):
        assert objective.own_attack(attack).bn == "running"
        results.append(adversarial_batch(model, objective, attack, x, y, generator=generator(5))[1])
    assert torch.equal(*results)
    assert (results[0] - x).abs().max() > 0.05


def test_start_of_the_attack() -> None:
    x = torch.rand(64, 3, 8, 8, generator=generator(1))
    noise = own_start(LBGAT(None), x, Place(0, len(x)), generator(2))
    assert noise is not None and noise.dtype == x.dtype
    # 12,288 normal numbers: mean within 5 standard errors, deviation likewise.
    assert abs(float(noise.mean())) <= 5 * START_STD / math.sqrt(noise.numel())
    rel = 5 / math.sqrt(2 * noise.numel())
    assert float(noise.std()) == pytest.approx(START_STD, rel=rel)


def test_a_step_trains_both_networks() -> None:
    model, guide = network(3).float(), network(4).float()
    objective = LBGAT(guide, 6.0)
    parameters = [*model.parameters(), *objective.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    step = make_train_step(model, objective, PGD(num_steps=2), optimizer, generator=generator(6))
    x, _, y = images(16)
    before = [copy.deepcopy(net.state_dict()) for net in (model, guide)]
    metrics = [step(x.float(), y) for _ in range(10)]
    assert float(metrics[-1]["loss"]) < float(metrics[0]["loss"])
    assert {"mse", "ce_guide", "kl", "accuracy_clean", "accuracy_adv"} < set(metrics[0])
    for net, old in zip((model, guide), before, strict=True):
        for name, tensor in net.state_dict().items():
            assert not torch.equal(tensor, old[name]), name


def test_alpha_is_checked() -> None:
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must be >= 0, got"):
            LBGAT(None, alpha)


def test_only_the_trained_network_is_attacked() -> None:
    model, guide = network(3), network(4)
    calls: list[int] = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    objective = LBGAT(guide)
    x, _, y = images()
    adversarial_batch(model, objective, PGD(num_steps=2), x, y)
    assert not calls
