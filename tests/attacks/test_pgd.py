"""PGD: the ball, the range, what it computes and what it leaves alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from networks import Operations, TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.attacks import NORMS as NORM_OBJECTS
from arat_fast.attacks import PGD, RandomStart, check_images, perturbation_norm
from arat_fast.models import (
    SplitBatchNorm2d,
    convert_split_batch_norm,
    create_model,
    use_branch,
    use_statistics,
)
from arat_fast.saved import export_plain

Norm = Literal["Linf", "L2", "L1"]
Bn = Literal["batch", "running", "batch_update"]
NORMS = pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
RADII = {"Linf": 0.1, "L2": 0.8, "L1": 3.0}


def tiny_net(channels: int = 3) -> nn.Module:
    return randomize(convert_split_batch_norm(TinyNet(channels)))


def batch(samples: int = 6, size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    x = torch.rand(samples, 3, size, size, generator=source, dtype=torch.float64)
    return x, torch.randint(0, 4, (samples,), generator=source)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad(), use_branch(model, "adv"), use_statistics(model, "running"):
        return F.cross_entropy(model(x), y, reduction="none")


@settings(max_examples=60, deadline=None)
@drawn(
    norm=st.sampled_from(["Linf", "L2", "L1"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bn=st.sampled_from(["batch", "running", "batch_update"]),
    shape=st.tuples(*[st.integers(low, high) for low, high in ((2, 5), (1, 4), (1, 9), (1, 9))]),
    eps=st.sampled_from([0.0, 1e-6, 8 / 255, 0.3, 2.0]),
    alpha=st.sampled_from([0.0, 2 / 255, 0.5, 10.0]),
    num_steps=st.integers(0, 3),
    num_restarts=st.integers(1, 2),
    random_start=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ball_and_range(
    norm: Norm,
    dtype: torch.dtype,
    bn: Bn,
    shape: tuple[int, int, int, int],
    eps: float,
    alpha: float,
    num_steps: int,
    num_restarts: int,
    random_start: bool,
    seed: int,
) -> None:
    source = generator(seed)
    # Half of the pixels are black or white, where the range cuts the ball.
    x = (2 * torch.rand(shape, generator=source, dtype=dtype) - 0.5).clamp(0, 1)
    y = torch.randint(0, 4, (shape[0],), generator=source)
    model = tiny_net(shape[1]).to(dtype)
    if norm == "Linf":
        eps, alpha = min(eps, 1.0), min(alpha, 1.0)
    attack = PGD(eps, alpha, num_steps, norm, random_start, num_restarts, bn)
    x_adv = attack(model, x, y, RandomStart(source))
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    check_images(x_adv)
    # Rounding: one unit in the last place per pixel.
    slack = torch.finfo(dtype).eps * NORM_OBJECTS[norm].reach(x[0].numel())
    assert perturbation_norm(x, x_adv, norm).max() <= eps * (1 + 1e-6) + slack
    if eps == 0 or (num_steps == 0 and not random_start):
        assert perturbation_norm(x, x_adv, "Linf").max() <= slack


def nearest_in_l1(x: Tensor, image: Tensor, eps: float) -> Tensor:
    """The perturbation nearest to the image in ball and range, its multiplier by bisection."""
    low, high = 0.0, float((image - x).abs().max())
    for _ in range(100):
        shift = (low + high) / 2
        delta = (image - x).sign() * ((image - x).abs() - shift).clamp_min(0)
        delta = (x + delta).clamp(0, 1) - x
        low, high = (shift, high) if delta.abs().sum() > eps else (low, shift)
    return delta


def transcription(
    model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, attack: PGD, clip: bool = True
) -> Tensor:
    """The published loop on a plain network, sample by sample where a norm is taken."""
    x_adv = x + noise
    for _ in range(attack.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(model(x_adv), y, reduction="sum").backward()
        assert x_adv.grad is not None
        moved = []
        for original, image, grad in zip(x, x_adv.detach(), x_adv.grad, strict=True):
            if attack.norm == "Linf":
                image = image + attack.alpha * grad.sign()
                delta = (image - original).clamp(-attack.eps, attack.eps)
            elif attack.norm == "L1":
                count = -(-grad.numel() // 20)
                moves = grad.abs() >= grad.flatten().abs().sort(descending=True).values[count - 1]
                image = image + attack.alpha * grad.sign() * moves / count
                delta = nearest_in_l1(original, image, attack.eps)
            else:
                image = image + attack.alpha * grad / (grad**2).sum().sqrt()
                delta = image - original
                length = float((delta**2).sum().sqrt())
                delta = delta * min(1.0, attack.eps / length)
            moved.append((original + delta).clamp(0, 1))
        x_adv = torch.stack(moved)
    return x_adv.detach()


@NORMS
@pytest.mark.parametrize("bn", ["batch", "running", "batch_update"])
def test_equals_a_direct_transcription(norm: Norm, bn: Bn) -> None:
    model = randomize(create_model("resnet8", 4)).double()
    x, y = batch()
    attack = PGD(eps=RADII[norm], alpha=RADII[norm] / 4, num_steps=4, norm=norm, bn=bn)
    noise = 0.05 * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    plain = export_plain(model, "adv").train(bn != "running")
    expected = transcription(plain, x, y, noise, attack)
    x_adv = attack(model.train(bn == "running"), x, y, RandomStart(noise=noise))
    assert (x_adv - expected).abs().max() <= 1e-12
    assert (x_adv - x).abs().max() > 0.01


@pytest.mark.parametrize(
    ("start_radius", "project", "alpha"), [(1.0, True, 0.125), (2.0, False, 0.1)]
)
def test_single_steps_are_those_of_their_papers(
    start_radius: float, project: bool, alpha: float
) -> None:
    """FGSM-RS, and N-FGSM, which leaves the ball."""
    model = randomize(create_model("resnet8", 4)).double()
    x, y = batch()
    attack = PGD(0.1, alpha, 1, start_radius=start_radius, project=project)
    begin = attack.start(x, RandomStart(generator(3)))
    assert start_radius * 0.099 < perturbation_norm(x, begin, "Linf").max() <= start_radius * 0.1
    image = begin.detach().requires_grad_()
    F.cross_entropy(export_plain(model, "adv").train()(image), y, reduction="sum").backward()
    assert image.grad is not None
    delta = begin - x + alpha * image.grad.sign()
    if project:
        delta = delta.clamp(-0.1, 0.1)
    x_adv = attack(model, x, y, RandomStart(generator(3)))
    assert (x_adv - (x + delta).clamp(0, 1)).abs().max() <= 1e-15
    assert (perturbation_norm(x, x_adv, "Linf").max() > 0.25) is not project


@NORMS
def test_random_start_and_generator(norm: Norm) -> None:
    x, y = batch(samples=200)
    x = 0.5 + 0 * x
    attack = PGD(eps=0.25, num_steps=0, norm=norm)
    model = tiny_net().double()
    first = attack(model, x, y, RandomStart(generator(5)))
    assert torch.equal(first, attack(model, x, y, RandomStart(generator(5))))
    assert not torch.equal(first, attack(model, x, y, RandomStart(generator(6))))
    radius = perturbation_norm(x, first, norm)
    if norm == "Linf":
        delta = first - x
        assert delta.abs().max() > 0.249 and abs(float(delta.mean())) < 0.01
    else:
        # A uniform radius: mean eps / 2, standard deviation eps / sqrt(12), 200 samples.
        assert abs(float(radius.mean()) - 0.125) < 5 * 0.25 / (12 * 200) ** 0.5
    fixed = PGD(eps=0.25, num_steps=0, norm=norm, random_start=False)
    assert torch.equal(fixed(model, x, y), x)


@pytest.mark.parametrize(
    ("norm", "given"),
    [
        ("Linf", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("L2", False), ("L1", False), ("Linf", True))
        ),
    ],
)
def test_the_attack_raises_the_loss_and_restarts_never_lower_it(norm: Norm, given: bool) -> None:
    """The cross-entropy or a loss that is given; also where gradients are switched off."""
    model = randomize(create_model("resnet8", 4)).double()
    x, y = batch(samples=12)
    eps = 0.3 * RADII[norm]
    loss_fn = partial(F.cross_entropy, target=y, reduction="none") if given else None
    losses = [cross_entropy(model, x, y)]
    for restarts in (1, 2, 4):
        attack = PGD(eps, eps / 4, 5, norm, bn="running", num_restarts=restarts)
        with torch.no_grad():
            x_adv = attack(model, x, y, RandomStart(generator(7)), loss_fn=loss_fn)
        losses.append(cross_entropy(model, x_adv, y))
    assert losses[1].sum() > losses[0].sum()
    for fewer, more in zip(losses[1:], losses[2:], strict=False):
        assert (more >= fewer - 1e-12).all()
    assert (losses[3] > losses[1]).any()


@pytest.mark.parametrize("bn", ["batch", "running", "batch_update"])
def test_only_image_gradients_are_computed(
    bn: Bn,
) -> None:
    model = randomize(create_model("resnet8", 4))
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.grad = torch.full_like(parameter, 3.0)
    x, y = batch()
    with Operations() as operations:
        PGD(num_steps=2, bn=bn)(model, x.float(), y)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    norms = sum(isinstance(m, SplitBatchNorm2d) for m in model.modules())
    masks = operations.masks(), operations.masks("native_batch_norm_backward")
    assert len(masks[0]) == 2 * convolutions and len(masks[1]) == 2 * norms
    assert all(mask == [True, False, False] for mask in [*masks[0], *masks[1]])
    # The classifier: one product forward and one backward in each step.
    assert len(operations.arguments("mm")) + len(operations.arguments("addmm")) == 4
    for index, parameter in enumerate(parameters):
        assert parameter.requires_grad
        if index % 2:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and bool((parameter.grad == 3).all())


def mixed_network() -> nn.Module:
    """Split and ordinary BatchNorm; one layer was set to eval mode by the user."""
    network = nn.Sequential(nn.BatchNorm2d(3), tiny_net(), nn.BatchNorm1d(4))
    network[1].bn2.eval()
    return network


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_restarts", [1, 2])
def test_no_buffer_and_no_mode_changes(
    bn: Literal["batch", "running"], training: bool, num_restarts: int
) -> None:
    model = mixed_network() if training else mixed_network().eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    PGD(num_steps=2, bn=bn, num_restarts=num_restarts)(model, x.float(), y)
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batch_update_moves_the_adversarial_statistics_only() -> None:
    model = randomize(create_model("resnet8", 4)).eval()
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    PGD(num_steps=3, bn="batch_update")(model, x.float(), y)
    assert not any(m.training for m in model.modules())
    for name, tensor in model.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor[0], before[name][0]), name
            assert (tensor[1] != before[name][1]).all(), name
        elif "tracked" in name:
            assert (tensor - before[name]).tolist() == [0, 3], name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_zero_gradient_in_l2(alpha: float) -> None:
    """Samples without a gradient stay where they are; the others move."""
    model = tiny_net()
    x, y = batch()

    def loss_fn(logits: Tensor) -> Tensor:
        return torch.cat([logits[:3, 0], 0 * logits[3:, 0]])

    attack = PGD(0.1, alpha, num_steps=3, norm="L2", random_start=False, bn="running")
    x_adv = attack(model, x.float(), y, loss_fn=loss_fn)
    check_images(x_adv)
    moved = perturbation_norm(x.float(), x_adv, "L2")
    assert (moved[:3] > 1e-3).all() and (moved[3:] < 1e-6).all()


@NORMS
@pytest.mark.parametrize("given", [False, True])
def test_the_start_of_parts_is_that_of_the_whole(norm: Norm, given: bool) -> None:
    """Whatever the parts, and wherever the process's samples lie in the batch of all."""
    x, _ = batch(samples=9)
    attack = PGD(eps=0.2, norm=norm, num_restarts=3)
    noise = 0.1 * torch.randn(x.shape, generator=generator(2)).double() if given else None
    keys = attack.draw_keys(generator(3), x.device, first_given=given)
    assert keys is not None and keys.shape == (3, 2)
    whole = RandomStart(noise=noise, keys=keys)
    for restart in range(3):
        expected = attack.start(x, whole, restart)
        for cuts in ([4, 9], [1, 2, 9], [9]):
            begins = [0, *cuts[:-1]]
            pieces = [
                attack.start(x[a:b], whole.part(slice(a, b)), restart)
                for a, b in zip(begins, cuts, strict=True)
            ]
            assert torch.equal(torch.cat(pieces), expected)
        own = None if noise is None else noise[5:]
        later = RandomStart(first=5, noise=own, keys=keys).part(slice(1, 3))
        assert later.first == 6
        assert torch.equal(attack.start(x[6:8], later, restart), expected[6:8])
    # Drawn as they are needed, the keys are the same.
    if not given:
        assert torch.equal(
            attack.start(x, RandomStart(generator(3))), attack.start(x, RandomStart(keys=keys))
        )


def test_keys_are_drawn_only_where_they_are_needed() -> None:
    before = generator(3).get_state()
    for attack, noise in ((PGD(random_start=False), False), (PGD(), True)):
        source = generator(3)
        assert attack.draw_keys(source, torch.device("cpu"), first_given=noise) is None
        assert torch.equal(source.get_state(), before)
