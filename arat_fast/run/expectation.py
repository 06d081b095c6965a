"""What a training will take, told before its first step."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch

from arat_fast.display import about
from arat_fast.evaluation.evaluate import evaluation_mode
from arat_fast.run.hooks import Hook

if TYPE_CHECKING:
    from arat_fast.run.state import Run

SAMPLES = 4
SURE = 0.5
"""Seconds of a pass from which on what every pass takes, whatever its images, is little of it."""
LONG = 600.0
"""Seconds of training from which on a run says what to expect."""


class Expectation(Hook):
    """On a CPU, where a step can take a minute, says what a training of ten minutes or more will
    take, by a pass of a few images; on a GPU the first steps tell at once."""

    def begin(self, run: Run) -> None:
        steps = run.total_steps - run.progress.step
        if run.device.type != "cpu" or not steps:
            return
        step, samples = seconds_a_step(run)
        if step * steps > LONG:
            other = "" if run.config.recipe == "digits" else "; the recipe digits takes minutes"
            # Threads that wait for each other on a busy machine are many times slower than one.
            if torch.get_num_threads() > 1 and os.getloadavg()[0] > (os.cpu_count() or 1):
                other += (
                    "; other programs keep the cores busy: stop it (Ctrl-C) and go on with "
                    "OMP_NUM_THREADS=1 and --resume, which is faster then"
                )
            run.display.say(
                f"expect roughly {about(step)} a step and {about(step * steps)} of training on "
                f"this machine, timed on {samples} images; evaluations and the attacks at the end "
                f"come on top{other}"
            )


def seconds_a_step(run: Run) -> tuple[float, int]:
    """Seconds of a step, by those of one pass and its gradient of the images, and how many images
    that pass had; nothing changes.

    A step is one such pass for each of the attack's, and those of the objective, forward and back
    through both kinds of images, which cost three. The images are four, and twice as many until the
    pass takes half a second or they are those of a step.
    """
    passes = 1.5
    if run.objective.needs_attack:
        attack = run.objective.own_attack(run.config.attack)
        passes = attack.num_steps * attack.num_restarts + 3
    share = run.data.train.plan.largest_share
    samples = min(SAMPLES, share)
    seconds_of_pass(run, samples)  # It warms up.
    while (seconds := seconds_of_pass(run, samples)) < SURE and samples < share:
        samples = min(2 * samples, share)
    return seconds * passes * share / samples, samples


def seconds_of_pass(run: Run, samples: int) -> float:
    """Of one pass of so many images and its gradient of them."""
    dtype = next(run.model.parameters()).dtype
    x = torch.zeros(samples, *run.data.train.image_shape, dtype=dtype, requires_grad=True)
    with evaluation_mode(run.model), run.step.autocast("cpu"), torch.enable_grad():
        began = time.perf_counter()
        torch.autograd.grad(run.model(x).float().sum(), x)
    return time.perf_counter() - began
