"""The loss around images: slices through an adversarial and a random direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, RandomStart, check_images, perturbation_norm
from arat_fast.evaluation.evaluate import ImageSet, evaluation_mode, predict
from arat_fast.evaluation.threat_model import ThreatModel

REACH = 2.0
"""How far a slice goes on each side, in multiples of eps."""


@dataclass(frozen=True)
class Surface:
    """Slices through the loss around K images, G by G points each.

    Attributes:
        axis: (G,), multiples of eps along either direction.
        loss: (K, G, G), cross-entropy; rows run along the random direction, columns along the
            adversarial one.
        margin: (K, G, G), logit of the label minus the largest other one; <= 0 is misclassified.
    """

    axis: NDArray[np.float64]
    loss: NDArray[np.float64]
    margin: NDArray[np.float64]

    def boundary(self, direction: str) -> list[float | None]:
        """Where each image is first misclassified along one direction alone, in multiples of eps.

        Args:
            direction: "adversarial" or "random".

        Returns:
            The first multiple on the axis, >= 0; None where there is none up to the end.
        """
        middle = len(self.axis) // 2
        rows = self.margin[:, middle] if direction == "adversarial" else self.margin[:, :, middle]
        ahead, axis = rows[:, middle:], self.axis[middle:]
        return [float(axis[wrong.argmax()]) if wrong.any() else None for wrong in ahead <= 0]

    def record(self) -> dict[str, Any]:
        """The numbers as JSON types."""
        return {
            "reach": float(self.axis[-1]),
            "points": len(self.axis),
            "boundary": {d: self.boundary(d) for d in ("adversarial", "random")},
        }


def loss_surface(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int,
    alpha: float,
    points: int = 41,
    reach: float = REACH,
    batch_size: int,
    seed: int = 0,
) -> Surface:
    """Loss and margin of the ``adv`` branch on a plane around each image.

    The plane is spanned by what PGD found, scaled to the radius, and by a random direction of the
    same norm: every pixel up or down by eps in L∞; a normal draw, made orthogonal to the first, in
    L2. Images on the plane are clamped to [0, 1].

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attack, eps > 0.
        num_steps, alpha: of PGD.
        points: G, odd so that the image itself is on the grid, >= 3.
        reach: extent of the plane, in multiples of eps.
        batch_size: samples at a time.
        seed: of the random start and of the random direction.

    Raises:
        ValueError: eps is 0, or ``points`` is even or below 3.
    """
    if not threat.eps > 0:
        raise ValueError(f"a loss surface needs a radius > 0, got eps {threat.eps}")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and >= 3, got {points}")
    check_images(images.x)
    generator = torch.Generator(images.x.device).manual_seed(seed)
    attack = PGD(threat.eps, alpha, num_steps, threat.norm, bn="running")
    middle = points // 2
    steps = reach * (torch.arange(points, dtype=torch.float64) - middle) / middle
    losses, margins = [], []
    with evaluation_mode(model):
        for x, y in zip(torch.split(images.x, 1), torch.split(images.y, 1), strict=True):
            found = attack(model, x, y, RandomStart(generator))
            first, second = _directions(x, found, threat, generator)
            # Row i, column j: x + axis[i] * random + axis[j] * adversarial.
            grid = steps.to(x)
            plane = x + grid.view(-1, 1, 1, 1, 1) * second + grid.view(1, -1, 1, 1, 1) * first[None]
            logits = predict(model, plane.flatten(0, 1).clamp(0, 1), batch_size)
            label = y.expand(len(logits))
            losses.append(F.cross_entropy(logits, label, reduction="none").view(points, points))
            margins.append(margin_of(logits, label).view(points, points))
    return Surface(steps.numpy(), _numpy(losses), _numpy(margins))


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, (N,); > 0 is classified correctly.

    Args:
        logits: (N, classes).
        y: labels (N,), int64.
    """
    right = logits.gather(1, y[:, None])[:, 0]
    return right - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def _directions(
    x: Tensor, found: Tensor, threat: ThreatModel, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    delta = found - x
    norm = perturbation_norm(x, found, threat.norm).to(x).view(-1, 1, 1, 1)
    first = torch.where(norm > 0, delta * (threat.eps / norm.clamp_min(1e-30)), 0.0)
    draw = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    if threat.norm == "Linf":
        return first, torch.where(draw < 0, -threat.eps, threat.eps).to(x)
    draw = draw - first * ((draw * first).sum() / first.square().sum().clamp_min(1e-30))
    return first, draw * (threat.eps / draw.norm())


def _numpy(parts: list[Tensor]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = torch.stack(parts).double().cpu().numpy()
    return result
