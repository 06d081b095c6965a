"""The ball that an attack may use, and the check that it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from arat_fast.attacks.pgd import check_length, perturbation_norm

ROUNDING = 1e-6
"""Allowance for float32 rounding: relative to eps, plus as much absolutely."""


@dataclass(frozen=True)
class ThreatModel:
    """Perturbations of norm at most ``eps`` that keep the image in [0, 1].

    Attributes:
        eps: radius in units of the image range, >= 0; in Linf at most 1.
        norm: "Linf" or "L2".
    """

    eps: float
    norm: Literal["Linf", "L2"] = "Linf"

    def __post_init__(self) -> None:
        check_length("eps", self.eps, self.norm)

    def allows(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Whether each adversarial image is one, (N,) bool; NaN never is.

        Args:
            x, x_adv: images (N, C, H, W).
        """
        near = perturbation_norm(x, x_adv, self.norm) <= self.eps * (1 + ROUNDING) + ROUNDING
        flat = x_adv.flatten(1)
        return near & (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)
