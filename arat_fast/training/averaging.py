"""Weight averaging: SWA (Izmailov et al., 2018) and an exponential moving average."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD
from arat_fast.data.batches import Batch
from arat_fast.data.plan import BatchPlan, Place
from arat_fast.distributed import ALONE, Ranks
from arat_fast.distributed.batch_norm import running_statistics
from arat_fast.models.split_batch_norm import Branch, SplitBatchNorm2d, copy_network, use_branch
from arat_fast.objectives.base import Objective
from arat_fast.training.step import adversarial_batch

if TYPE_CHECKING:
    from arat_fast.config import AverageConfig


class WeightAverage:
    """A second set of weights, averaged along training.

    ``model`` holds the average and is None until the first update. "swa" averages the parameters
    with equal weights; its BatchNorm statistics are stale until :func:`refresh_batch_norm`. "ema"
    averages parameters and statistics with a decay.

    Args:
        config: kind, interval and decay.
        trained: the network whose weights are averaged.
        start_step: first step, counted from 0, after which the average may be updated.
    """

    def __init__(self, config: AverageConfig, trained: nn.Module, start_step: int) -> None:
        self.config = config
        self.trained = trained
        self.start_step = start_step
        self.model: nn.Module | None = None
        self.num_averaged = 0
        self.statistics_fresh = True

    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (0-based), where it is one of those to be averaged."""
        if self.config.kind == "none" or step < self.start_step:
            return
        if (step - self.start_step) % self.config.interval:
            return
        if self.model is None:
            self.model = copy_network(self.trained).requires_grad_(False)
        else:
            self._average(self.model)
        self.num_averaged += 1
        self.statistics_fresh = self.config.kind == "ema"

    @torch.no_grad()
    def _average(self, mean: nn.Module) -> None:
        averaged: list[Tensor] = list(mean.parameters())
        current: list[Tensor] = list(self.trained.parameters())
        if self.config.kind == "swa":
            torch._foreach_lerp_(averaged, current, 1 / (self.num_averaged + 1))
            return
        pairs = list(zip(mean.buffers(), self.trained.buffers(), strict=True))
        averaged += [a for a, b in pairs if b.is_floating_point()]
        current += [b for _, b in pairs if b.is_floating_point()]
        torch._foreach_lerp_(averaged, current, 1 - self.config.decay)
        counts = [(a, b) for a, b in pairs if not b.is_floating_point()]
        torch._foreach_copy_([a for a, _ in counts], [b for _, b in counts])

    @property
    def share_of_first(self) -> float:
        """Weight of the first averaged weights in an exponential average, in [0, 1]; 0 in others,
        where all have the same, and before it has begun."""
        if self.config.kind != "ema" or not self.num_averaged:
            return 0.0
        return self.config.decay ** (self.num_averaged - 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`load_state_dict` goes on exactly."""
        return {
            "num_averaged": self.num_averaged,
            "statistics_fresh": self.statistics_fresh,
            "model": None if self.model is None else self.model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_averaged = state["num_averaged"]
        self.statistics_fresh = state["statistics_fresh"]
        self.model = None
        if state["model"] is not None:
            self.model = copy_network(self.trained).requires_grad_(False)
            self.model.load_state_dict(state["model"])


def refresh_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    attack: PGD,
    generator: torch.Generator | None = None,
    ranks: Ranks = ALONE,
    plan: BatchPlan | None = None,
) -> None:
    """Re-estimate the running statistics of every BatchNorm2d, both branches, with one pass.

    The images are attacked as the objective has them attacked, and go through the deployed
    BatchNorm in the batches of its :meth:`~arat_fast.objectives.Objective.passes`, each normalised
    by itself; the clean branch of a split one sees clean images. Every pass of every sample has
    the same weight.

    Args:
        model: the network; its statistics are changed in place, its mode is kept.
        batches: one epoch of training batches.
        objective: that the network was trained with. ARREST's replay is left out: which samples it
            takes depends on the running statistics.
        attack: as configured. It runs on the statistics of each batch, whatever it or the objective
            says: running statistics are what is being estimated.
        generator: source of the random starts.
        ranks: the processes that share every batch; all get the same statistics.
        plan: of the batches, which start with the first; needed with several processes.
    """
    layers = [m for m in model.modules() if isinstance(m, (SplitBatchNorm2d, nn.BatchNorm2d))]
    if not layers:
        return
    split = any(isinstance(layer, SplitBatchNorm2d) for layer in layers)
    momenta = [layer.momentum for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    for layer in layers:
        for buffer, start in (
            (layer.running_mean, 0),
            (layer.running_var, 1),
            (layer.num_batches_tracked, 0),
        ):
            if buffer is not None:
                buffer.fill_(start)
    seen: dict[bool, int] = {False: 0, True: 0}
    model.train()
    try:
        for number, (x, y) in enumerate(batches):
            place = Place(0, len(x)) if plan is None else plan.place(number)
            begin = objective.random_start(
                attack, x, generator, first=place.first, num_samples=place.total
            ).part(slice(0, len(x)))
            x, x_adv = adversarial_batch(model, objective, attack, x, y, begin, bn="batch")
            branches: dict[Branch, list[Tensor]] = {"adv": objective.passes(model, x, x_adv)}
            if split:
                branches["clean"] = [x]
            for branch, passes in branches.items():
                for done, images in enumerate(passes, start=1):
                    for layer in layers:
                        # Of all processes where they normalise together, else of this one.
                        together = getattr(layer, "group", None) is not None
                        num = place.total if together else len(x)
                        layer.momentum = num / (len(passes) * seen[together] + done * num)
                    with torch.no_grad(), use_branch(model, branch):
                        model(images)
            seen[False] += len(x)
            seen[True] += place.total
        if not ranks.alone:
            share = seen[False] / seen[True]
            for buffer in running_statistics(model):
                buffer.copy_(ranks.sum_(buffer * share))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
