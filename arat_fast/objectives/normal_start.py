"""What TRADES, MART and LBGAT share: the attack's statistics and where it starts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from arat_fast.attacks.pgd import PGD
from arat_fast.objectives.base import Objective

START_STD = 1e-3
"""Standard deviation of the normal noise that the attack starts from."""


class NormalStart(Objective):
    """Base of objectives that attack in eval mode, from the images plus normal noise.

    Radius, steps, step size and norm are those of the step's attack, ``bn`` and ``random_start``
    are not. In L-infinity the start is neither projected nor clamped, the steps after it are: so
    does the code of TRADES, MART and LBGAT. Their code for L2, where there is one, makes other
    steps, which are not followed.
    """

    def own_attack(self, attack: PGD) -> PGD:
        return dataclasses.replace(attack, bn="running")

    def start_noise(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> Tensor | None:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        noise = torch.empty(
            (num_samples, *x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        return START_STD * noise.normal_(generator=generator)


def check_weight(name: str, value: float) -> None:
    """ValueError unless the weight of a loss is a number >= 0."""
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
