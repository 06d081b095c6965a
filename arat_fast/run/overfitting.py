"""Catastrophic overfitting: seen while it happens, and undone."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from arat_fast.evaluation import ThreatModel, pgd_accuracy
from arat_fast.evaluation.evaluate import ImageSet
from arat_fast.run.hooks import Hook, Restart
from arat_fast.training.metrics import CatastrophicOverfittingError

if TYPE_CHECKING:
    from arat_fast.run.state import Run

MAX_ATTACK_STEPS = 2
"""Steps of an attack that can be overfitted to."""
NUM_STEPS = 10
NUM_IMAGES = 32
COST = 0.015
"""Passes of the watch's attack over those of the training, at most: less than the 2 % of the time
that looks may take, for their batches are small."""
SMALLEST_FALL = 0.15
"""Below this share of the images it may be chance."""
MAX_CURES = 3


def interval(batch_size: int, num_steps: int) -> int:
    """Training steps between two looks, so that their passes stay within :data:`COST`.

    Args:
        batch_size: images of a training step.
        num_steps: of its attack.
    """
    return math.ceil(NUM_STEPS * NUM_IMAGES / (COST * batch_size * (num_steps + 1)))


class OverfittingWatch(Hook):
    """PGD-10 on the same few images again and again, for attacks of one or two steps.

    The images are validation images, where there are any; else training images, which a network
    that overfits so is not robust on either. Its accuracy has fallen catastrophically where in two
    looks running it is at most half of the best before, while that under the training's own attack
    has risen. That is said and logged (lines of the kind "watch"), and what ``watch.act`` says is
    done.

    The looks draw from a generator of their own: as long as nothing falls, the weights are the same
    with and without them.

    Source: the failure is described by Wong et al., ICLR 2020 (arXiv 2001.03994), section 5.4.
    """

    name = "overfitting"

    def __init__(self) -> None:
        self.run: Run | None = None
        self.images: ImageSet | None = None
        self.every = 0
        self.checked = 0
        self.best = self.single = 0.0
        self.low = self.fallen = False
        self.num_cures = 0
        self.alpha: float | None = None
        self.num_steps: int | None = None
        self.good: Any = None

    def begin(self, run: Run) -> None:
        config = run.config
        watched = config.attack.num_steps <= MAX_ATTACK_STEPS and run.objective.needs_attack
        if config.watch.act == "off" or not watched:
            return
        self.run = run
        self.every = config.watch.every or interval(config.data.batch_size, config.attack.num_steps)
        images = run.data.val or run.data.probe
        shard = run.ranks.shard
        # The probe's batches are shared already.
        if run.data.val is not None:
            self.images = ImageSet.from_batches(images, NUM_IMAGES, shard)
        else:
            x, y = next(iter(images.epoch(0)))
            part = shard.share(NUM_IMAGES)
            own = slice(0, part.stop - part.start)
            self.images = ImageSet(x[own], y[own], images.classes)
        self._set_attack()
        self._keep()

    def log(self, run: Run, line: dict[str, Any]) -> None:
        if self.run is None or line["kind"] != "train" or "accuracy_adv" not in line:
            return
        if run.progress.step - self.checked < self.every:
            return
        self.checked = run.progress.step
        began = time.perf_counter()
        accuracy, single = self.accuracy(run), line["accuracy_adv"]
        look = {"pgd": accuracy, "num_steps": NUM_STEPS, "single": single}
        before, single_before = self.best, self.single
        low = accuracy <= before / 2 and before - accuracy >= SMALLEST_FALL
        # Early in a training one look alone may be low, whatever the attack.
        fell, self.low = low and self.low and single >= single_before, low
        if accuracy >= self.best:
            self.best, self.single = accuracy, single
        first = fell and not self.fallen
        self.fallen = fell or (self.fallen and accuracy <= before / 2)
        look["seconds"] = time.perf_counter() - began
        run.log("watch", line["epoch"], {**look, "fell": first})
        if not (low or self.fallen):
            self._keep()
        if first:
            self._act(
                run,
                f"catastrophic overfitting at step {run.progress.step}: PGD-{NUM_STEPS} finds an "
                f"answer wrong for all but {accuracy:.0%} of {NUM_IMAGES} images, all but "
                f"{before:.0%} before, while the accuracy under the training's own attack went "
                f"from {single_before:.0%} to {single:.0%}",
                line["epoch"],
            )

    def accuracy(self, run: Run) -> float:
        """Share of the images that PGD-10 finds no wrong answer for, over all processes."""
        attack = run.config.attack
        assert self.images is not None
        found = torch.zeros(2, dtype=torch.int64)
        if len(self.images.x):
            result = pgd_accuracy(
                run.model,
                self.images,
                ThreatModel(attack.eps, attack.norm),
                num_steps=NUM_STEPS,
                alpha=attack.eps / 4,
                batch_size=NUM_IMAGES,
                seed=run.config.seed,
            )
            found = torch.tensor([int(result.correct.sum()), len(result.correct)])
        correct, seen = run.ranks.gather(found).view(-1, 2).sum(dim=0).tolist()
        return float(correct / seen)

    def _act(self, run: Run, what: str, epoch: float) -> None:
        act = run.config.watch.act
        if act == "stop":
            raise CatastrophicOverfittingError(f"{what}; {run.last_checkpoint()}")
        if act == "say" or self.num_cures == MAX_CURES:
            left = "" if act == "say" else f", after {MAX_CURES} times back"
            run.warn(
                f"{what}; it goes on{left}: such weights are not robust; --watch.act more-steps "
                "goes back to before, with two steps for one"
            )
            return
        cures = self.num_cures + 1
        attack = run.step.attack
        run.restore(_copied(self.good))
        self.num_cures = cures
        # As far in all, in twice as many steps; or half as far.
        self.alpha = attack.alpha / 2
        self.num_steps = attack.num_steps * (2 if act == "more-steps" else 1)
        self._set_attack()
        # What the state to go back to next would otherwise not know.
        self._keep()
        run.bar.go_to(run.progress.step)
        run.warn(
            f"{what}; back to step {run.progress.step} with attack.num_steps={self.num_steps} and "
            f"attack.alpha={self.alpha:g} ({cures} of at most {MAX_CURES} times)"
        )
        run.log("watch", run.progress.step / run.steps_per_epoch, {"fell_at": epoch})
        raise Restart

    def _set_attack(self) -> None:
        if self.run is not None and self.alpha is not None and self.num_steps is not None:
            self.run.step.attack = dataclasses.replace(
                self.run.step.attack, alpha=self.alpha, num_steps=self.num_steps
            )

    def _keep(self) -> None:
        """Keep the state of the run, on the host, where it may be gone back to."""
        run = self.run
        assert run is not None
        if run.config.watch.act in ("smaller-step", "more-steps"):
            state = {name: part.state_dict() for name, part in run.parts.items()}
            self.good = _copied(state)

    def state_dict(self) -> dict[str, Any]:
        names = ("checked", "best", "single", "low", "fallen", "num_cures", "alpha", "num_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_attack()


def _copied(state: Any) -> Any:
    def copied(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return tree_map(copied, state)
