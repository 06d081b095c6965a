"""The norms in which a perturbation is measured: one small class each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, get_args

from torch import Tensor

from arat_fast.settings import NormName
from arat_kernels.pgd_step import pgd_step, random_start


class Norm(ABC):
    """A norm, and the balls around images that it makes.

    Perturbations are (N, ...), a sample's norm is over all dimensions but the first; radii and step
    sizes are in units of the image range [0, 1].
    """

    name: ClassVar[NormName]
    largest: ClassVar[float] = math.inf
    """Largest radius that makes sense for images in [0, 1]."""
    num_targets: ClassVar[int] = 9
    """Classes that standard AutoAttack's APGD aims at."""
    num_restarts: ClassVar[int] = 1
    """Of standard AutoAttack's APGD on the cross-entropy."""
    step: ClassVar[Callable[..., Tensor]]
    """:func:`arat_kernels.pgd_step.pgd_step` in this norm."""
    random_start: ClassVar[Callable[..., Tensor]]
    """:func:`arat_kernels.pgd_step.random_start` in this norm."""
    limit: ClassVar[str]
    """What an attacker may do with an image, ``{eps}`` in place of the radius."""

    def __init_subclass__(cls) -> None:
        # Not methods, which every step of an attack would pass through.
        cls.step = staticmethod(partial(pgd_step, norm=cls.name))
        cls.random_start = staticmethod(partial(random_start, norm=cls.name))

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation, (N,).

        Args:
            delta: (N, ...), floating point.
        """

    @abstractmethod
    def reach(self, num_pixels: int) -> float:
        """The radius in which every image lies in the ball around any other.

        Args:
            num_pixels: values in an image, channels included.
        """

    def farthest(self, draw: Tensor, eps: float) -> Tensor:
        """A perturbation of size ``eps`` for each random direction.

        Args:
            draw: directions (N, ...), none of them zero.
            eps: radius.
        """
        return eps * draw / self.size(draw).view(-1, *[1] * (draw.ndim - 1))

    def check(self, name: str, value: float) -> None:
        """Raise ValueError unless a radius or a step size is one for images in [0, 1].

        Args:
            name: of the setting, for the message.
            value: finite, >= 0 and at most ``largest``.
        """
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if value > self.largest:
            hint = f"; did you mean {value:g}/255?" if value <= 255 else ""
            raise ValueError(
                f"{name} must be in [0, {self.largest:g}] with {self.name}, since images lie in "
                f"[0, 1], got {value:g}{hint}"
            )


class Linf(Norm):
    """The largest change of a value."""

    name = "Linf"
    largest = 1.0
    limit = "may change every pixel by at most {eps} on a brightness scale from 0 to 1 (L∞ norm)"

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(dim=1)

    def reach(self, num_pixels: int) -> float:
        return 1.0

    def farthest(self, draw: Tensor, eps: float) -> Tensor:
        """A corner of the ball."""
        return eps * draw.sign()


class L2(Norm):
    """Euclidean length."""

    name = "L2"
    limit = (
        "may change the whole image by at most {eps} in Euclidean length (L2), "
        "on a brightness scale from 0 to 1"
    )

    def size(self, delta: Tensor) -> Tensor:
        length: Tensor = delta.flatten(1).norm(dim=1)
        return length

    def reach(self, num_pixels: int) -> float:
        return math.sqrt(num_pixels)


class L1(Norm):
    """Sum of the changes. A step moves few values, those with the largest gradients."""

    name = "L1"
    num_targets = 5
    num_restarts = 5
    limit = (
        "may change the values of an image by at most {eps} in sum (L1), "
        "on a brightness scale from 0 to 1"
    )

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(dim=1)

    def reach(self, num_pixels: int) -> float:
        return float(num_pixels)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (Linf(), L2(), L1())}
"""By the name that settings and records have."""
assert tuple(NORMS) == get_args(NormName)
