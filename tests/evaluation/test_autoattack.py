"""Standard AutoAttack: the reference code's own robust set, the ball, the random state."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.autopgd_base import APGDAttack_targeted as Targeted
from torch import Tensor, nn

from arat_fast.datasets.digits import MAX_VALUE, load_digits
from arat_fast.doctor import FOLD
from arat_fast.evaluation import (
    ImageSet,
    ThreatModel,
    autoattack,
    clean_accuracy,
    parallel,
    pgd_accuracy,
)
from arat_fast.evaluation.autoattack import is_randomised
from arat_fast.evaluation.evaluate import evaluation_mode
from arat_fast.evaluation.parallel import SharedNetwork
from arat_fast.evaluation.suite import evaluate_all
from arat_fast.models import use_branch
from arat_fast.models.resnet import BasicBlock, ResNet
from arat_kernels.implementation import replace_operations

# The function of the same name hides the module.
MODULE = importlib.import_module("arat_fast.evaluation.autoattack")


@pytest.fixture(scope="module")
def linear() -> nn.Module:
    """A linear classifier of the digits: thousands of forward passes take seconds."""
    pixels, labels = load_digits(train=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    x = pixels.float() / MAX_VALUE
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def test_the_time_left_is_told_without_square_before_it_runs(linear: nn.Module) -> None:
    notes: list[str] = []
    run = MODULE._Run(
        linear, ThreatModel(0.1), 4, 0, 10, "standard", True, MODULE.STANDARD, "AutoAttack",
        lambda *said: notes.append(said[-1]),
    )  # fmt: skip
    for name in ("fab-t", "square"):
        run.begin(name, 0, 4, 4, 4)
        run.tick(run.passes(name))
    start = "4 images not yet fooled, at this speed at most 0:00:00 left"
    assert notes == [f"{start}, then Square", start]


def digits(count: int, num_classes: int = 10) -> ImageSet:
    pixels, labels = load_digits(train=False)
    keep = (labels < num_classes).nonzero().flatten()[:count]
    return ImageSet(
        pixels[keep].float() / MAX_VALUE, labels[keep], tuple("0123456789"[:num_classes])
    )


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.04), ("L2", 0.25)])
def test_same_robust_set_as_the_reference_code(linear: nn.Module, norm: str, eps: float) -> None:
    images, threat = digits(40), ThreatModel(eps, norm)  # type: ignore[arg-type]
    seen: dict[str, list[tuple[int, int]]] = {}
    result = autoattack(
        linear,
        images,
        threat,
        batch_size=40,
        seed=5,
        progress=lambda name, done, total, *_: seen.setdefault(name, []).append((done, total)),
    )
    with torch.random.fork_rng():
        reference = AutoAttack(linear, norm=norm, eps=eps, seed=5, version="standard")
        x_adv, _ = reference.run_standard_evaluation(images.x, images.y, batch_size=40)
        expected = linear(x_adv).argmax(1) == images.y
    assert torch.equal(result.correct, expected)
    assert 0 < result.accuracy < 1
    assert threat.allows(images.x, result.x_adv).all()
    assert result.details["num_rejected"] == 0
    after = list(result.details["attacks"].values())
    assert list(result.details["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert after == sorted(after, reverse=True) and after[-1] == result.accuracy
    names = enumerate(result.details["attacks"], 1)
    assert list(seen) == [f"AutoAttack {name} ({number} of 4)" for number, name in names]
    for told in seen.values():
        assert told == sorted(told) and 0 < told[-1][0] <= told[-1][1]
    pgd = pgd_accuracy(linear, images, threat, num_steps=20, alpha=eps / 4, batch_size=40)
    assert result.accuracy <= pgd.accuracy


@pytest.mark.slow
def test_apgd_in_l1_is_the_reference_codes(linear: nn.Module) -> None:
    """Its larger first balls, five starts, and no example that rounding pushes out of the ball."""
    images, threat = digits(40), ThreatModel(0.8, "L1")
    names = ("apgd-ce", "apgd-t")
    result = autoattack(linear, images, threat, batch_size=40, seed=5, attacks=names)
    with torch.random.fork_rng():
        reference = AutoAttack(linear, norm="L1", eps=0.8, seed=5, version="standard")
        reference.attacks_to_run = list(names)
        x_adv, _ = reference.run_standard_evaluation(images.x, images.y, batch_size=40)
        expected = linear(x_adv).argmax(1) == images.y
    assert torch.equal(result.correct, expected)
    assert 0 < result.accuracy < 1
    assert threat.allows(images.x, result.x_adv).all()
    assert result.details["num_rejected"] == 0
    pgd = pgd_accuracy(linear, images, threat, num_steps=20, alpha=0.2, batch_size=40)
    assert result.accuracy <= pgd.accuracy < 1


@pytest.fixture(scope="module")
def convolutional() -> nn.Module:
    """Split BatchNorm, a residual and a projection, trained a little on noised digits."""
    pixels, labels = load_digits(train=True)
    x = pixels.float() / MAX_VALUE
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ResNet(BasicBlock, (1, 1), (8, 16), num_classes=10, in_channels=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with use_branch(model, "adv"):
            for step in range(60):
                batch = slice(step % 11 * 128, step % 11 * 128 + 128)
                noised = x[batch] + 0.1 * torch.randn_like(x[batch]).sign()
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(noised), labels[batch]).backward()
                optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "eps", "version", "num_threads"),
    [
        ("Linf", 0.05, "torchattacks10", 1),
        ("L2", 0.4, "torchattacks10", 1),
        ("Linf", 0.05, "standard", 2),
    ],
)
def test_the_fast_path_has_the_same_robust_set(
    convolutional: nn.Module,
    norm: str,
    eps: float,
    version: Any,
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folded, in several threads, and as it is."""
    monkeypatch.setattr(MODULE, "NUM_QUERIES", 300)
    monkeypatch.setattr(parallel, "MIN_PART", 1)
    images, threat = digits(30), ThreatModel(eps, norm)  # type: ignore[arg-type]
    options = {"batch_size": 20, "version": version, "seed": 1}
    parts: list[int] = []
    real = SharedNetwork.map
    monkeypatch.setattr(
        SharedNetwork, "map", lambda self, call, p: parts.append(len(p)) or real(self, call, p)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        fast, plain = (
            autoattack(convolutional, images, threat, fast=fast, **options)
            for fast in (True, False)
        )
    finally:
        torch.set_num_threads(before)
    assert max(parts, default=1) == num_threads
    assert torch.equal(fast.correct, plain.correct)
    assert 0.1 < fast.accuracy < 0.9
    assert fast.after.keys() == plain.after.keys()
    assert all(torch.equal(standing, plain.after[name]) for name, standing in fast.after.items())
    assert (fast.details["path"], fast.details["network"]) == ("fast", "folded")
    assert (plain.details["path"], plain.details["network"]) == ("plain", "eager")
    assert threat.allows(images.x, fast.x_adv).all()
    with evaluation_mode(convolutional):
        broken = convolutional(fast.x_adv).argmax(1) != images.y
    assert torch.equal(broken, ~fast.correct)


def test_why_a_network_was_not_folded(linear: nn.Module) -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = linear(x)
            return y if float(y.sum()) > 0 else y

    result = autoattack(
        Untraceable(), digits(4), ThreatModel(0.5), batch_size=4, attacks=("square",)
    )
    assert result.details["network"] == "eager"
    assert "cannot be traced" in result.details["eager_because"]
    assert result.details["num_queries"] == MODULE.NUM_QUERIES
    assert "num_steps" not in result.details and "num_targets" not in result.details


def test_a_folded_network_that_the_self_check_found_wrong_is_not_taken(linear: nn.Module) -> None:
    x = digits(4).x
    try:
        replace_operations([FOLD])
        network, reason = MODULE.fast_network(linear, x)
    finally:
        replace_operations([])
    assert network is linear and "wrong on this card" in reason
    assert MODULE.fast_network(linear, x)[0] is not linear


def test_what_only_the_fast_network_lost_is_attacked_again(
    linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "NUM_QUERIES", 50)
    images, threat = digits(12), ThreatModel(0.04)
    plain = autoattack(
        linear, images, threat, batch_size=12, version="torchattacks10", seed=5, fast=False
    )
    wrong = nn.Sequential(linear, nn.Linear(10, 10, bias=False))
    wrong[1].weight.data = -torch.eye(10)
    monkeypatch.setattr(MODULE, "fast_network", lambda *_: (wrong.eval(), ""))
    fast = autoattack(linear, images, threat, batch_size=12, version="torchattacks10", seed=5)
    assert fast.details["num_disputed"] >= int(plain.correct.sum())
    assert torch.equal(fast.correct, plain.correct)


def test_torchattacks10_is_the_reference_code_with_ten_steps(linear: nn.Module) -> None:
    images, threat = digits(40), ThreatModel(0.04)
    result = autoattack(linear, images, threat, batch_size=40, version="torchattacks10", seed=5)
    with torch.random.fork_rng():
        reference = AutoAttack(linear, norm="Linf", eps=0.04, seed=5, version="standard")
        for attack, make in ((reference.apgd, APGDAttack), (reference.apgd_targeted, Targeted)):
            short = make(linear, n_iter=10, norm="Linf", eps=0.04, device="cpu")
            for name in ("n_iter", "n_iter_2", "n_iter_min", "size_decr"):
                setattr(attack, name, getattr(short, name))
        reference.fab.n_iter = 10
        reference.square.rescale_schedule = True
        x_adv, _ = reference.run_standard_evaluation(images.x, images.y, batch_size=40)
        expected = linear(x_adv).argmax(1) == images.y
    assert torch.equal(result.correct, expected)
    assert list(result.details["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (result.details["version"], result.details["num_steps"]) == ("torchattacks10", 10)
    assert threat.allows(images.x, result.x_adv).all()
    with pytest.raises(ValueError, match="got 'plus'"):
        autoattack(linear, images, threat, batch_size=40, version="plus")  # type: ignore[arg-type]


def test_random_states_and_gradients_are_left_alone(
    linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where all are broken early, the rest is skipped; cuDNN times no algorithms for batches
    that shrink."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    searches = set()
    watched = linear.register_forward_hook(lambda *_: searches.add(torch.backends.cudnn.benchmark))
    linear.zero_grad()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    ran = set()
    result = autoattack(
        linear, digits(10), ThreatModel(0.9), batch_size=10, progress=lambda *told: ran.add(told[0])
    )
    watched.remove()
    assert searches == {False} and torch.backends.cudnn.benchmark
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])
    assert all(p.grad is None for p in linear.parameters())
    assert result.accuracy == result.details["attacks"]["square"] == 0
    assert ran == {"AutoAttack apgd-ce (1 of 4)"}


@pytest.mark.slow
def test_a_network_that_draws_random_numbers(linear: nn.Module) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.3 * torch.randn_like(x)

    noisy, images, threat = nn.Sequential(linear, Noisy()).eval(), digits(12), ThreatModel(0.06)
    assert is_randomised(noisy, images) and not is_randomised(linear, images)
    state = torch.get_rng_state()
    suite = evaluate_all(
        noisy,
        images,
        threat,
        num_steps=1,
        alpha=0.01,
        attacks=["autoattack"],
        batch_size=12,
        seed=0,
    )
    result = suite.results["autoattack"]
    assert list(result.after) == ["apgd-ce", "apgd-dlr"]
    found = {key: result.details[key] for key in ("version", "num_steps", "num_draws", "network")}
    assert found == {"version": "rand", "num_steps": 100, "num_draws": 20, "network": "eager"}
    assert "rand" in suite.remarks()["randomised"]
    torch.set_rng_state(state)
    assert 0 < result.accuracy < clean_accuracy(noisy, images, batch_size=12).accuracy


@pytest.mark.slow
def test_few_classes(linear: nn.Module) -> None:
    five = nn.Sequential(linear, nn.Linear(10, 5, bias=False))
    five[1].weight.data = torch.eye(10)[:5]
    result = autoattack(five, digits(8, 5), ThreatModel(0.02), batch_size=8)
    assert result.details["num_targets"] == 4
    three = ImageSet(*(lambda s: (s.x, s.y))(digits(4, 3)), ("0", "1", "2"))
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        autoattack(linear, three, ThreatModel(0.02), batch_size=8)
