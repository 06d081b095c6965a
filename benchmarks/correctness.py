"""Whether a fast step computes what the float32 step computes: a speed counts only beside this."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from arat_fast.device import full_float32
from arat_fast.training.step import TrainStep
from benchmarks.contestants import Contestant, build_step, fast_precision
from benchmarks.workload import EPS, Workload

ROUNDING = 0.01
"""Relative error of a loss after one bfloat16 forward pass: 2^-9 for each of some ten roundings."""


@dataclass(frozen=True)
class Reference:
    """Losses of the float32 eager step.

    Attributes:
        losses: of the first steps.
        rounded: the same from weights that are rounded to bfloat16 once, at the start: how far
            training carries a difference of that size.
    """

    losses: list[float]
    rounded: list[float]

    @property
    def budget(self) -> float:
        """Largest mean relative difference that passes: twice that of the rounded weights, and the
        error of one forward pass."""
        return 2 * mean_difference(self.rounded, self.losses) + ROUNDING


def reference_losses(
    bn: str, workload: Workload, device: torch.device, num_steps: int
) -> Reference:
    """Run the float32 eager step, TF32 off.

    Args:
        bn: BatchNorm statistics of the attack.
        workload: the step.
        device: where.
        num_steps: training steps.
    """
    with full_float32():
        plain, rounded = (
            _losses(
                build_step(workload, device, bn=bn, precision=torch.float32, round_weights=rounds),
                workload,
                device,
                num_steps,
            )
            for rounds in (False, True)
        )
    return Reference(plain, rounded)


def compare_losses(
    contestant: Contestant,
    workload: Workload,
    device: torch.device,
    reference: Reference,
) -> dict[str, Any]:
    """The first losses of one of our steps beside those of the float32 eager step.

    Both start from the same weights, see the same batches and start each attack at the same noise.

    Args:
        contestant: one of ours.
        workload: the step.
        device: where it runs.
        reference: :func:`reference_losses` with the same attack on the same workload.

    Returns:
        "losses", "reference", "mean_relative_difference", its "budget", None for what is not
        finite, and whether it is "within".
    """
    precision = fast_precision(device)
    bn, graph = contestant.bn, contestant.graph
    step = build_step(workload, device, bn=bn, precision=precision, graph=graph)
    losses = _losses(step, workload, device, len(reference.losses))
    mean = mean_difference(losses, reference.losses)
    return {
        "contestant": contestant.name,
        "workload": asdict(workload),
        "losses": [_number(value) for value in losses],
        "reference": [_number(value) for value in reference.losses],
        "mean_relative_difference": _number(mean),
        "budget": _number(reference.budget),
        # Not where one is no number.
        "within": mean <= reference.budget < math.inf,
    }


def mean_difference(losses: list[float], reference: list[float]) -> float:
    """Mean over the steps of the relative difference; NaN where a loss of the reference is 0, which
    no step has that computes."""
    return statistics.fmean(
        abs(a - b) / abs(b) if b else math.nan for a, b in zip(losses, reference, strict=True)
    )


def _losses(
    step: TrainStep, workload: Workload, device: torch.device, num_steps: int
) -> list[float]:
    source = torch.Generator().manual_seed(1)
    losses = []
    for x, y in workload.batches(num_steps, device, seed=2):
        noise = torch.empty(x.shape).uniform_(-EPS, EPS, generator=source).to(device)
        losses.append(step(x, y, noise=noise)["loss"].item())
    return losses


def _number(value: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
