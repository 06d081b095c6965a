"""Clean and PGD accuracy, the threat model, and what an evaluation leaves behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from arat_fast.attacks import PGD, RandomStart
from arat_fast.evaluation import ImageSet, ThreatModel, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.evaluate import accept, evaluation_mode, predict
from arat_fast.evaluation.pieces import Pieces
from arat_fast.models import convert_split_batch_norm, create_model

CLASSES = tuple("abcdef")


def images(count: int = 24, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    y = torch.randint(len(CLASSES), (count,), generator=generator)
    return ImageSet(x, y, CLASSES)


def network(seed: int = 0) -> nn.Module:
    """A split network whose branches differ and that fits some of the images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 6)
        )
        model = convert_split_batch_norm(model)
        model[1].running_mean.normal_()
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_clean_accuracy_is_the_share_of_right_answers() -> None:
    model, data = network(), images()
    model.eval()
    with torch.no_grad():
        expected = model(data.x).argmax(1) == data.y
    result = clean_accuracy(model, data, batch_size=7)
    assert torch.equal(result.correct, expected)
    assert result.record()["correct"] == int(expected.sum())
    assert result.accuracy == pytest.approx(float(expected.float().mean()))
    clean = clean_accuracy(model, images(200), batch_size=100, branch="clean").correct
    assert not torch.equal(clean_accuracy(model, images(200), batch_size=100).correct, clean)


def test_nothing_is_left_behind() -> None:
    model, data = network(), images()
    model.train()
    before = state(model)
    pgd_accuracy(model, data, ThreatModel(0.1), num_steps=2, alpha=0.05, batch_size=9)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model[0].weight.requires_grad_(False)
    with evaluation_mode(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert not model[0].weight.requires_grad and model[4].weight.requires_grad


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(["Linf", "L2", "L1"]),
    eps=st.floats(0, 0.6),
    alpha=st.floats(0, 1),
    num_steps=st.integers(0, 3),
    batch_size=st.integers(1, 30),
)
def test_every_example_is_inside_the_ball(
    norm: str, eps: float, alpha: float, num_steps: int, batch_size: int
) -> None:
    model, data = network(), images()
    threat = ThreatModel(eps, norm)  # type: ignore[arg-type]
    result = pgd_accuracy(
        model, data, threat, num_steps=num_steps, alpha=alpha, batch_size=batch_size
    )
    assert threat.allows(data.x, result.x_adv).all()
    assert result.details["num_rejected"] == 0
    clean = clean_accuracy(model, data, batch_size=24).correct
    assert not (result.correct & ~clean).any()


def test_stronger_attacks_never_raise_accuracy() -> None:
    model, data = network(3), images(200)
    base = {"num_steps": 5, "alpha": 0.02, "batch_size": 200}
    weak = pgd_accuracy(model, data, ThreatModel(0.02), **base)
    strong = pgd_accuracy(model, data, ThreatModel(0.08), **base)
    more = pgd_accuracy(model, data, ThreatModel(0.08), **{**base, "num_steps": 20})
    restarts = pgd_accuracy(model, data, ThreatModel(0.08), **base, num_restarts=4)
    clean = clean_accuracy(model, data, batch_size=200)
    assert clean.accuracy > weak.accuracy > strong.accuracy >= more.accuracy
    assert strong.accuracy >= restarts.accuracy


def test_every_restart_counts_and_not_the_highest_loss_alone() -> None:
    """Random points, no steps: a wrong answer can have a lower loss than a right one."""
    generator = torch.Generator().manual_seed(2)
    data = ImageSet(
        torch.rand(300, 3, 1, 1, generator=generator) * 0.4 + 0.3,
        torch.randint(3, (300,), generator=generator),
        ("a", "b", "c"),
    )
    model, threat, restarts = nn.Flatten(), ThreatModel(0.2), 6
    options = {"num_steps": 0, "alpha": 0.0, "batch_size": 300, "seed": 7}
    result = pgd_accuracy(model, data, threat, num_restarts=restarts, **options)
    draws = torch.Generator().manual_seed(7)
    single = PGD(eps=0.2, alpha=0.0, num_steps=0)
    tried = [single(model, data.x, data.y, RandomStart(draws)) for _ in range(restarts)]
    right = torch.stack([model(x).argmax(1) == data.y for x in (data.x, *tried)])
    assert torch.equal(result.correct, right.all(0))
    assert torch.equal(model(result.x_adv).argmax(1) == data.y, right.all(0))
    assert (~right[0] & right[1:].all(0)).any(), "no image that only the attack sets right"
    strongest = PGD(eps=0.2, alpha=0.0, num_steps=0, num_restarts=restarts)(
        model, data.x, data.y, RandomStart(torch.Generator().manual_seed(7))
    )
    missed = (model(strongest).argmax(1) == data.y) & ~right[1:].all(0)
    assert missed.any(), "the example shows nothing"
    first = pgd_accuracy(model, data, threat, **options)
    assert torch.equal(first.correct, right[:2].all(0))
    with pytest.raises(ValueError, match="num_restarts"):
        pgd_accuracy(model, data, threat, num_restarts=0, **options)


def test_examples_outside_the_ball_do_not_count() -> None:
    model, data = network(), images()
    threat = ThreatModel(0.1)
    far = data.x.clone()
    far[0] = (data.x[0] + 0.3).clamp(0, 1)
    far[1, 0, 0, 0] = 1.0001
    far[2, 0, 0, 0] = float("nan")
    far[3] = (data.x[3] + 0.1).clamp(0, 1)
    with evaluation_mode(model):
        still, x_adv, rejected = accept(model, data.x, data.y, far, threat)
        assert rejected == 3
        assert torch.equal(x_adv[:3], data.x[:3]) and torch.equal(x_adv[3], far[3])
        assert torch.equal(still, predict(model, x_adv, 24).argmax(1) == data.y)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_threat_model_boundary(norm: str) -> None:
    x = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    step = {"Linf": 0.2, "L2": 0.05, "L1": 0.0125}[norm]
    inside, outside = x + step, x + step * 1.0001
    threat = ThreatModel(0.2, norm)  # type: ignore[arg-type]
    assert threat.allows(x, inside).all() and not threat.allows(x, outside).any()


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_images_out_of_range(value: float) -> None:
    data = images()
    data.x[3, 0, 2, 2] = value
    with pytest.raises(ValueError, match="images"):
        clean_accuracy(network(), data, batch_size=8)


@pytest.mark.parametrize("eps", [-0.1, 8])
def test_eps_out_of_range(eps: float) -> None:
    """8 would be levels of a pixel."""
    with pytest.raises(ValueError, match="eps"):
        ThreatModel(eps)
    assert ThreatModel(8, "L2").eps == 8


def test_tf32_is_off_inside_and_restored() -> None:
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with evaluation_mode(create_model("resnet8", 10, 1)):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def test_batches_that_are_done_already_change_nothing(tmp_path: Path) -> None:
    """What was interrupted goes on with the draws of the whole, whichever batches are on disk."""
    model, data = network(), images()
    options = {"num_steps": 2, "alpha": 0.05, "batch_size": 10, "num_restarts": 2, "seed": 3}
    whole = pgd_accuracy(model, data, ThreatModel(0.1), **options)
    pieces = Pieces(tmp_path, "checksum")

    def stop(name: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pgd_accuracy(model, data, ThreatModel(0.1), **options, pieces=pieces, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    again = Pieces(tmp_path, "checksum")
    resumed = pgd_accuracy(model, data, ThreatModel(0.1), **options, pieces=again)
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == kept[path] for path in kept)
    assert torch.equal(resumed.x_adv, whole.x_adv) and torch.equal(resumed.correct, whole.correct)
    assert resumed.details == whole.details
    assert (whole.details["precision"], whole.details["batch_size"]) == ("float32", 10)


@pytest.mark.parametrize(("batch", "every_layer"), [(8, False), (400, True)])
def test_a_signal_is_heard_between_layers_of_a_large_batch(batch: int, every_layer: bool) -> None:
    """Forward and backward; of a small one, between the passes."""
    network = nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192) for _ in range(6)))
    calls = 0

    class Stop(BaseException):
        pass

    def check(limit: int = 10**9) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise Stop

    images = ImageSet(torch.rand(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64), ("a", "b"))
    attack: dict[str, Any] = {"num_steps": 1, "alpha": 0.01, "batch_size": batch}
    expected = pgd_accuracy(network, images, ThreatModel(0.03), **attack)
    got = pgd_accuracy(network, images, ThreatModel(0.03), **attack, check=check)
    assert torch.equal(got.x_adv, expected.x_adv)
    assert not any(module._forward_hooks for module in network.modules())
    # Three passes of eight modules, and one backward.
    assert calls == (4 * 8 if every_layer else 3)
    for limit in range(1, calls + 1):
        calls = 0
        with pytest.raises(Stop):
            pgd_accuracy(network, images, ThreatModel(0.03), **attack, check=partial(check, limit))
        assert calls == limit
