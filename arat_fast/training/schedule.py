"""Learning-rate schedules, as functions of the step, and the size of the images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arat_fast.config import ScheduleConfig

OFFICIAL_FIRST_EPOCH = 0.2
"""The official code's first epoch runs at 0.02, a fifth of its 0.1."""


RANGE = 1e-3
"""Learning rate at which a range test begins, of that at which it ends."""


def learning_rate(
    config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Learning rate of one step.

    Args:
        config: which schedule.
        peak: the highest learning rate, > 0.
        step: 0-based index of the step in the run.
        steps_per_epoch: >= 1.
        epochs: length of the run.

    Source: "steps" and "official_steps": arXiv 2402.14648 and its code; "cosine": Loshchilov and
    Hutter, 2017; "onecycle": Smith and Topin, 2018; the warm-up of the others: Goyal et al., 2017
    (arXiv 1706.02677), section 2.2, from 0 instead of the unscaled rate; "range": Smith, 2017
    (arXiv 1506.01186), section 3.3, by equal factors.
    """
    warm_steps = config.warmup_epochs * steps_per_epoch
    if step + 1 < warm_steps:
        peak = peak * (step + 1) / warm_steps
    epoch = step // steps_per_epoch
    total = epochs * steps_per_epoch
    if config.name == "steps":
        return peak * config.decay ** _milestones_passed(config, epoch, epochs)
    if config.name == "official_steps":
        # The official code sets the rate of an epoch after it: everything is one epoch late.
        if epoch == 0:
            return peak * OFFICIAL_FIRST_EPOCH
        return peak * config.decay ** _milestones_passed(config, epoch - 1, epochs)
    if config.name == "range":
        return peak * math.pow(RANGE, 1 - (step + 1) / total)
    done = (step + 0.5) / total
    if config.name == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    if done < config.warmup:
        return peak * done / config.warmup
    return peak * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))) / 2


def progressive_size(sizes: tuple[int, ...], epoch: int, epochs: int) -> int | None:
    """Size of the images of an epoch, of sizes for equal parts of the run; None where there are
    none.

    Args:
        sizes: in pixels, in order.
        epoch: in [0, epochs).
        epochs: length of the run.
    """
    return sizes[epoch * len(sizes) // epochs] if sizes else None


def _milestones_passed(config: ScheduleConfig, epochs_done: int, epochs: int) -> int:
    return sum(epochs_done >= round(milestone * epochs) for milestone in config.milestones)
