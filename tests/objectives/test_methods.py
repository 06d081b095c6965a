"""Every method but ARAT against its formula, sample by sample, in float64: values, gradients,
running statistics, attack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import (
    TinyNet,
    assert_same_gradients,
    generator,
    randomize,
    tiny_network,
    triples,
)
from torch import Tensor, nn

from arat_fast.attacks import PGD, RandomStart
from arat_fast.models import convert_split_batch_norm, use_statistics
from arat_fast.objectives import (
    ARAT,
    ARREST,
    LBGAT,
    MART,
    OBJECTIVES,
    TRADES,
    AdversarialTraining,
    NaturalTraining,
    Objective,
)
from arat_fast.objectives.arrest import angular_distance
from arat_fast.objectives.normal_start import START_STD
from arat_fast.saved import export_plain
from arat_fast.training.step import TrainStep, adversarial_batch

ATTACK = PGD(eps=0.1, alpha=0.03, num_steps=4)
START = RandomStart()


def trained_by(model: nn.Module, objective: Objective) -> list[nn.Parameter]:
    return [p for m in (model, objective) for p in m.parameters() if p.requires_grad]


BUILDERS: dict[str, Callable[[nn.Module], Objective]] = {
    "at": lambda model: AdversarialTraining(),
    "trades": lambda model: TRADES(),
    "mart": lambda model: MART(),
    "lbgat": lambda model: LBGAT(randomize(TinyNet(), 4).to(next(model.parameters()).dtype)),
    "arrest": lambda model: ARREST(model, ATTACK, ("bn2",)),
}
NORMAL_START = ("trades", "mart", "lbgat")


def test_every_objective_is_tested() -> None:
    """A new one is added to ``BUILDERS``, and meets what every method promises."""
    assert set(BUILDERS) | {"arat", "natural"} == set(OBJECTIVES)


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def divergence(clean: Tensor, adv: Tensor) -> Tensor:
    p, q = softmax(clean), softmax(adv)
    return (p * (p / q).log()).sum()


def trades(clean: Tensor, adv: Tensor, guide: Tensor, label: int, weight: float) -> Tensor:
    return -softmax(clean)[label].log() + weight * divergence(clean, adv)


def mart(clean: Tensor, adv: Tensor, guide: Tensor, label: int, weight: float) -> Tensor:
    p, q = softmax(clean), softmax(adv)
    others = torch.cat([q[:label], q[label + 1 :]])
    bce = -q[label].log() - (1.0001 - others.max() + 1e-12).log()
    tied = (p * (p.log() - (q + 1e-12).log())).sum()
    return bce + weight * tied * (1.0000001 - p[label])


def lbgat(clean: Tensor, adv: Tensor, guide: Tensor, label: int, weight: float) -> Tensor:
    squares = torch.stack([(adv[k] - guide[k]) ** 2 for k in range(len(guide))]).mean()
    return squares - softmax(guide)[label].log() + weight * divergence(clean, adv)


def adversarial(clean: Tensor, adv: Tensor, guide: Tensor, label: int, weight: float) -> Tensor:
    return -softmax(adv)[label].log()


def natural(clean: Tensor, adv: Tensor, guide: Tensor, label: int, weight: float) -> Tensor:
    return -softmax(clean)[label].log()


Formula = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def mean_of(formula: Formula, logits: list[Tensor], targets: Tensor, weight: float) -> Tensor:
    """Over the samples, and over the classes by their targets (N, K) or labels (N,)."""
    if targets.ndim == 1:
        targets = nn.functional.one_hot(targets, 4)
    rows = zip(*logits, strict=True)
    losses = [[formula(*row, label, weight) for label in range(4)] for row in rows]
    return (targets * torch.stack([torch.stack(row) for row in losses])).sum(dim=1).mean()


# The passes, in the order of the authors' code, which the running statistics keep.
FORMULAS: dict[str, tuple[Any, Formula, str, list[str]]] = {
    "natural": (lambda guide, w: NaturalTraining(), natural, "clean", ["ce_clean"]),
    "at": (lambda guide, w: AdversarialTraining(), adversarial, "adv", ["ce_adv"]),
    "trades": (lambda guide, w: TRADES(w), trades, "clean adv clean", ["ce_clean", "kl"]),
    "mart": (lambda guide, w: MART(w), mart, "clean adv", ["ce_adv", "margin", "kl"]),
    "lbgat": (LBGAT, lbgat, "adv clean", ["mse", "ce_guide", "kl"]),
}


@pytest.mark.parametrize("name", [*BUILDERS, "natural", "arat"])
def test_targets_are_weights_of_the_classes(name: str) -> None:
    """One class alone is that class; the classification loss is linear in the others."""
    builders = BUILDERS | {
        "natural": lambda model: NaturalTraining(),
        "arat": lambda model: ARAT(model, ("bn2",), (3, 8, 8)).double(),
    }
    x, x_adv, y = triples()
    outputs = []
    # The largest weight is the class itself: for MART it is the label elsewhere.
    one_hot = torch.nn.functional.one_hot(y, 4).double()
    other = one_hot.roll(1, dims=1)
    for targets in (y, one_hot, other.argmax(dim=1), 1.5 * one_hot + 0.5 * other):
        model = convert_split_batch_norm(tiny_network()) if name == "arat" else tiny_network()
        torch.manual_seed(1)
        outputs.append(builders[name](model)(model, x, x_adv, targets, START))
    assert abs(outputs[0].loss - outputs[1].loss) <= 1e-14
    term = next(name for name in outputs[0].terms if name.startswith("ce"))
    first, _, second, both = (output.terms[term] for output in outputs)
    assert abs(both - (1.5 * first + 0.5 * second)) <= 1e-13


@pytest.mark.parametrize(
    ("name", "weight", "soft"),
    [
        *((name, weight, False) for name in FORMULAS for weight in (0.0, 1.0, 6.0)),
        # The margin of MART is that of one class.
        *((name, 6.0, True) for name in FORMULAS if name != "mart"),
    ],
)
def test_loss_gradients_and_statistics_are_those_of_the_formula(
    name: str, weight: float, soft: bool
) -> None:
    build, formula, passes, terms = FORMULAS[name]
    model, guide = tiny_network(3), tiny_network(4)
    plain, plain_guide = copy.deepcopy(model), copy.deepcopy(guide)
    x, x_adv, y = triples()
    targets = torch.nn.functional.one_hot(y, 4).double()
    if soft:
        targets = 0.7 * targets + 0.3 * targets.roll(1, dims=0)
    output = build(guide, weight)(model, x, x_adv, targets if soft else y, START)
    output.loss.backward()
    logits = {}
    for kind in passes.split():
        # A pass that is made a second time is made for the running statistics.
        got = plain(x if kind == "clean" else x_adv)
        logits.setdefault(kind, got)
    guiding = plain_guide(x) if name == "lbgat" else next(iter(logits.values()))
    both = [logits.get("clean", guiding), logits.get("adv", guiding)]
    expected = mean_of(formula, [*both, guiding], targets, weight)
    expected.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    assert float((sum(output.terms.values()) - output.loss).detach().abs()) <= 1e-12
    if name == "lbgat" and not weight:
        terms = terms[:2]
    assert list(output.terms) == terms
    for kind, got in (("clean", output.logits_clean), ("adv", output.logits_adv)):
        assert (got is not None) == (kind in logits)
        if got is not None:
            torch.testing.assert_close(got, logits[kind])
    assert_same_gradients(model, plain)
    assert_same_gradients(guide, plain_guide)


def test_where_gradients_of_lbgat_reach() -> None:
    """The distance moves both networks, the labels the guide alone, the divergence f alone."""
    model, guide = tiny_network(3), tiny_network(4)
    terms = LBGAT(guide, 6.0)(model, *triples(), START).terms

    def reaches(term: Tensor, network: nn.Module) -> bool:
        parameters = list(network.parameters())
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        return any(grad is not None for grad in grads)

    reached = {n: (reaches(term, model), reaches(term, guide)) for n, term in terms.items()}
    assert reached == {"mse": (True, True), "ce_guide": (False, True), "kl": (True, False)}


def test_the_clean_branch_as_guide() -> None:
    """Distillation from the clean branch: two networks that share all but their BatchNorm."""
    model = randomize(convert_split_batch_norm(tiny_network().float()), 3).double()
    clean_net, adv_net = export_plain(model, "clean"), export_plain(model, "adv")
    x, x_adv, y = triples()
    output = LBGAT(None, 6.0)(model, x, x_adv, y, START)
    output.loss.backward()
    expected = mean_of(lbgat, [adv_net(x), adv_net(x_adv), clean_net(x)], y, 6.0)
    expected.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    pairs = zip(clean_net.named_parameters(), adv_net.parameters(), strict=True)
    for (name, clean), adv in pairs:
        grad = model.get_parameter(name).grad
        assert clean.grad is not None and adv.grad is not None and grad is not None
        split = grad.shape != clean.grad.shape
        whole = torch.stack([clean.grad, adv.grad]) if split else clean.grad + adv.grad
        assert (grad - whole).abs().max() <= 1e-10 * max(1e-3, float(whole.abs().max())), name


def test_mart_stays_finite_where_the_network_is_certain() -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * torch.tensor([0.0, 200, 0, 0]).expand(len(x), 4)

    model = Certain()
    x = torch.rand(3, 3, 4, 4, generator=generator(1))
    loss = MART()(model, x, x, torch.tensor([0, 1, 2]), START).loss
    (gradient,) = torch.autograd.grad(loss, model.parameters())
    assert loss.isfinite() and gradient.isfinite()
    # Wrong and certain: a cross-entropy of 200 and the largest margin term, twice in three.
    assert float(loss.detach()) == pytest.approx((400 - 2 * math.log(1e-4)) / 3, rel=1e-3)


@pytest.mark.parametrize("name", NORMAL_START)
def test_attack_step_by_step(name: str) -> None:
    """Eval mode, a normal start that is not clamped, then sign steps, projection and clamp."""
    model = tiny_network()
    objective = BUILDERS[name](model)
    x, _, y = triples()
    noise = START_STD * torch.empty_like(x).normal_(generator=generator(7))
    with use_statistics(model, "running"):
        clean = model(x).softmax(dim=1).detach()
        expected = x + noise
        for _ in range(4):
            expected.requires_grad_()
            logits = model(expected)
            if name == "mart":
                loss = len(y) * mean_of(adversarial, [logits] * 3, y, 0.0)
            else:
                loss = (clean * (clean.log() - logits.log_softmax(dim=1))).sum()
            (gradient,) = torch.autograd.grad(loss, expected)
            moved = expected.detach() + 0.03 * gradient.sign()
            expected = torch.min(torch.max(moved, x - 0.1), x + 0.1).clamp(0, 1)
    start = objective.random_start(ATTACK, x, generator(7))
    _, got = adversarial_batch(model, objective, ATTACK, x, y, start)
    assert (got - expected).abs().max() <= 1e-12
    assert (got - x).abs().max() > 0.05


def test_the_normal_start() -> None:
    x = torch.rand(64, 3, 8, 8, generator=generator(1))
    noise = LBGAT(None).start_noise(x, len(x), generator(2))
    assert noise is not None and noise.dtype == x.dtype
    # 12,288 normal numbers: mean within 5 standard errors, deviation likewise.
    assert abs(float(noise.mean())) <= 5 * START_STD / math.sqrt(noise.numel())
    assert float(noise.std()) == pytest.approx(START_STD, rel=5 / math.sqrt(2 * noise.numel()))


@pytest.mark.parametrize("name", BUILDERS)
def test_the_attack_leaves_the_networks_as_they_are(name: str) -> None:
    model = tiny_network()
    objective = BUILDERS[name](model)
    calls: list[int] = []
    for network in objective.networks():
        network.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    x, _, y = triples()
    start = objective.random_start(ATTACK, x, generator(1))
    adversarial_batch(model, objective, ATTACK, x, y, start)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in trained_by(model, objective))
    assert all(module.training for module in model.modules()) and not calls


@pytest.mark.parametrize("name", [*BUILDERS, "arat", "arat, separate passes"])
def test_passes_are_those_of_the_training(name: str) -> None:
    model = tiny_network()
    if name in BUILDERS:
        objective = BUILDERS[name](model)
    else:
        separate = name.endswith("passes")
        objective = ARAT(model, ["bn2"], (3, 8, 8), separate_passes=separate).double()
    x, x_adv, y = triples()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    objective(model, x, x_adv, y, START)
    expected = objective.passes(model, x, x_adv)
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_bf16_has_the_gradients_of_float32(name: str) -> None:
    """Passes without gradients share the autocast context with those that have them."""
    x, _, y = triples(16)
    grads: list[Tensor] = []
    for precision in (torch.float32, torch.bfloat16):
        model = tiny_network().float()
        objective = BUILDERS[name](model)
        trained = trained_by(model, objective)
        step = TrainStep(
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


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_trains_what_is_to_be_trained(name: str) -> None:
    model = tiny_network().float()
    objective = BUILDERS[name](model)
    if isinstance(objective, LBGAT):
        objective.alpha = 6.0
    trained = trained_by(model, objective)
    assert len({id(p) for p in trained}) == len(trained)
    step = TrainStep(
        model,
        objective,
        ATTACK,
        torch.optim.SGD(trained, lr=0.05),
        precision=torch.float32,
        generator=generator(6),
    )
    x, _, y = triples(16)
    second = [copy.deepcopy(network.state_dict()) for network in objective.networks()]
    before = copy.deepcopy(model.state_dict())
    losses = [float(step(x.float(), y)["loss"]) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    for network, old in zip(objective.networks(), second, strict=True):
        moved = [not torch.equal(t, old[key]) for key, t in network.state_dict().items()]
        assert all(moved) if name == "lbgat" else not any(moved)
        assert any(module.training for module in network.modules()) == (name == "lbgat")


def moved_networks() -> tuple[nn.Module, nn.Module]:
    """A natural network, and one that has moved away from it."""
    natural = tiny_network().eval()
    moved = copy.deepcopy(natural).train()
    source = generator(5)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return natural, moved


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


@pytest.mark.parametrize("replay", ["all", "half", "none"])
def test_arrest_is_its_formula(replay: str) -> None:
    natural, model = moved_networks()
    x, x_adv, y = triples(8)
    ordered = sorted(clean_angles(model, natural, x))
    # A threshold between the fourth and the fifth of eight angles: half are replayed.
    assert ordered[4] - ordered[3] > 1e-6
    threshold = {"all": 0.0, "half": (ordered[3] + ordered[4]) / 2, "none": 1.0}[replay]
    objective = ARREST(natural, ATTACK, ("bn2",), distillation=7.0, replay=threshold).train()
    plain = copy.deepcopy(model)
    noisy = ATTACK.start(x, RandomStart(generator(9))).clamp(0, 1)
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

    output = objective(model, x, x_adv, y, RandomStart(generator(9)))
    output.loss.backward()
    assert float((output.loss - expected).detach().abs()) <= 1e-12 * float(expected.detach().abs())
    assert float((sum(output.terms.values()) - output.loss).detach().abs()) <= 1e-12
    assert list(output.terms) == ["ce_adv", "distillation"]
    assert float(output.metrics["replayed"]) == sum(moved) / 8
    # Measuring the angles moved no running statistics, training on x' moved them once.
    assert_same_gradients(model, plain)
    assert all(p.grad is None for p in objective.natural.parameters())
    objective.adopt(model)
    assert torch.equal(objective.natural.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_replayed_images_lie_in_the_ball_and_in_the_range(norm: Any) -> None:
    natural, model = moved_networks()
    attack = PGD(eps=0.3, alpha=0.1, num_steps=1, norm=norm, random_start=False)
    x, x_adv, y = triples()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    for _ in range(2):
        objective = ARREST(natural, attack, ("bn2",), replay=0.0)
        objective(model, x, x_adv, y, RandomStart(generator(4)))
    used = seen[-1]
    delta = (used - x).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)
    assert size.max() <= 0.3 * (1 + 1e-9) and size.min() > 0
    assert used.min() >= 0 and used.max() <= 1
    assert sum(torch.equal(images, used) for images in seen) == 2


def test_at_the_start_of_arrest_nothing_has_moved() -> None:
    """The network is the natural one: nothing is replayed, and the gradient is finite."""
    natural = tiny_network().eval()
    model = copy.deepcopy(natural)
    x, _, y = triples()
    with use_statistics(model, "running"):
        output = ARREST(natural, ATTACK, ("bn2",), replay=1e-6)(model, x, x, y, START)
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


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda v: TRADES(v), "beta"),
        (lambda v: MART(v), "beta"),
        (lambda v: LBGAT(None, v), "alpha"),
        (lambda v: ARREST(TinyNet(), ATTACK, distillation=v), "distillation"),
        (lambda v: ARREST(TinyNet(), ATTACK, replay=v), "replay"),
    ],
)
def test_weights_are_checked(build: Callable[[float], Objective], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 0"):
        build(value)
