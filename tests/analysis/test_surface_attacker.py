"""Loss surfaces and the attacker's view against a few lines in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.analysis.attacker import NUM_SHOWN, _chosen, attacker_numbers, attacker_view
from arat_fast.analysis.surface import Surface, loss_surface, margin_of
from arat_fast.attacks import PGD
from arat_fast.evaluation import ImageSet, ThreatModel


class Small(nn.Module):
    """Two layers on 4×4 images, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(4 * x)
        return logits


def images(n: int = 30) -> ImageSet:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, 1, 4, 4, generator=generator)
    y = Small()(x).argmax(dim=1)
    y[::7] = (y[::7] + 1) % 3
    return ImageSet(x, y, ("a", "b", "c"))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_surface_point_by_point(norm: str) -> None:
    model, data = Small(), images(3)
    threat = ThreatModel(0.2, norm)  # type: ignore[arg-type]
    found = loss_surface(
        model, data, threat, num_steps=3, alpha=0.1, points=5, reach=2.0, batch_size=7, seed=4
    )
    assert found.axis.tolist() == [-2, -1, 0, 1, 2]
    generator = torch.Generator().manual_seed(4)
    attack = PGD(0.2, 0.1, 3, norm, bn="running")  # type: ignore[arg-type]
    wide = Small().double()
    for k in range(3):
        x, y = data.x[k : k + 1], data.y[k : k + 1]
        delta = (attack(model, x, y, generator=generator) - x).double()
        draw = torch.randn(x.shape, generator=generator).double()
        if norm == "Linf":
            first, second = 0.2 * delta / delta.abs().max(), 0.2 * torch.sign(draw)
        else:
            first = 0.2 * delta / delta.norm()
            draw = draw - first * (draw * first).sum() / (first * first).sum()
            second = 0.2 * draw / draw.norm()
        for i, b in enumerate(found.axis):
            for j, a in enumerate(found.axis):
                logits = wide((x.double() + a * first + b * second).clamp(0, 1))
                assert np.isclose(found.loss[k, i, j], F.cross_entropy(logits, y).item(), atol=2e-5)
                others = [logits[0, c].item() for c in range(3) if c != int(y)]
                margin = logits[0, int(y)].item() - max(others)
                assert np.isclose(found.margin[k, i, j], margin, atol=2e-5)


def test_boundary() -> None:
    axis = np.linspace(-2, 2, 5)
    margin = np.ones((2, 5, 5))
    margin[0, 2, 3:] = -1
    margin[0, 0, 2] = -1
    margin[1, 4, 2] = 0
    surface = Surface(axis, np.zeros((2, 5, 5)), margin)
    assert surface.boundary("adversarial") == [1.0, None]
    assert surface.boundary("random") == [None, 2.0]
    assert surface.record()["reach"] == 2.0


@pytest.mark.parametrize(("eps", "points"), [(0.0, 5), (0.1, 4), (0.1, 1)])
def test_surface_arguments(eps: float, points: int) -> None:
    with pytest.raises(ValueError, match="radius|points"):
        loss_surface(
            Small(),
            images(1),
            ThreatModel(eps),
            num_steps=1,
            alpha=0.1,
            points=points,
            batch_size=4,
        )


def test_margin() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    assert margin_of(logits, torch.tensor([0, 1])).tolist() == [1.0, 0.0]


def test_attackers_view() -> None:
    model, data, threat = Small(), images(), ThreatModel(0.15)
    view = attacker_view(model, data, threat, num_steps=4, alpha=0.05, batch_size=8, seed=1)
    x, y = data.x[view["index"]].double(), data.y
    wide = Small().double()
    clean = wide(data.x.double())
    assert np.array_equal(view["pred_clean"], clean.argmax(dim=1))
    assert np.allclose(view["prob_clean"], clean.softmax(dim=1).amax(dim=1).detach(), atol=1e-6)
    label = clean.softmax(dim=1)[torch.arange(len(y)), y].detach()
    assert np.allclose(view["prob_label_clean"], label, atol=1e-6)
    assert np.allclose(view["margin_clean"], margin_of(clean, y).detach(), atol=1e-5)
    assert (view["norm"] <= 0.15 * (1 + 1e-5)).all()
    assert np.array_equal(view["margin_adv"] > 0, view["pred_adv"] == y.numpy())
    kept = torch.from_numpy(view["x_adv"])
    assert np.array_equal(view["pred_adv"][view["index"]], model(kept).argmax(dim=1))
    x.requires_grad_()
    F.cross_entropy(wide(x), y[view["index"]], reduction="sum").backward()
    assert np.allclose(view["saliency"], x.grad, atol=1e-5)

    numbers = attacker_numbers(view)
    before, after = view["pred_clean"], view["pred_adv"]
    assert numbers["num_samples"] == 30
    assert numbers["right_clean"] == sum(before == y.numpy())
    assert numbers["turned"] == sum((before == y.numpy()) & (after != y.numpy())) > 0
    for true in range(3):
        for answer in range(3):
            count = sum((y.numpy() == true) & (after == answer))
            assert numbers["confusion"][true][answer] == count
    assert sum(count for *_, count in numbers["routes"]) == numbers["turned"]
    assert numbers["confidence_wrong"] == pytest.approx(
        np.mean([p for p, a, t in zip(view["prob_adv"], after, y, strict=True) if a != t])
    )
    assert numbers["median_margin"]["adv"] < numbers["median_margin"]["clean"]


@pytest.mark.parametrize(("turned", "others"), [(20, 20), (2, 30), (30, 2), (3, 4), (0, 5), (5, 0)])
def test_images_that_are_kept(turned: int, others: int) -> None:
    right_adv = torch.arange(turned + others) >= turned
    chosen = _chosen(torch.ones(turned + others, dtype=torch.bool), right_adv)
    assert len(chosen) == len(set(chosen.tolist())) == min(NUM_SHOWN, turned + others)
    assert int((~right_adv[chosen]).sum()) == min(turned, max(6, NUM_SHOWN - others))
