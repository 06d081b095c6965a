"""Is the robustness real? Signs of gradients that are masked rather than useless to an attack."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, RandomStart, check_images
from arat_fast.evaluation.evaluate import (
    ImageSet,
    Progress,
    ThreatModel,
    accept,
    evaluation_mode,
    pgd_accuracy,
    predict,
)

SIGNIFICANCE = 0.01
"""A weaker attack counts as stronger below this p-value of the one-sided sign test."""

_RANDOM_DRAWS = 100
_SHARES = {
    "gradient": (0.05, "zero", ": an attack that follows it stands still there."),
    "restarts": (
        0.1,
        "gained",
        ". The outcome hangs on where the attack starts: the surface is rough.",
    ),
    "full range": (
        0.02,
        "left",
        ", and any image can be made of any other: it does not find the way.",
    ),
}
"""Largest share of images that is no warning, the name of their number, and what the warning is."""
_RIVALS = {
    "steps": "Fewer steps break more: the way uphill does not lead on.",
    "radius": "A larger ball leaves more right.",
    "random": "It takes no gradient to find what the gradient does not.",
    "black-box": "An attack that sees no gradient is the stronger one.",
    "transfer": "The other network’s gradient is the better guide.",
}
"""The warning where an attack breaks more than the one that must be the stronger."""


class Tried(NamedTuple):
    """One attack on all images.

    Attributes:
        kind: "gradient", "random", "black-box" or "transfer".
        name: in words.
        correct: (N,) bool, what it left right; wrong as they are count as broken.
        settings: JSON types.
    """

    kind: str
    name: str
    correct: Tensor
    settings: dict[str, Any]

    @property
    def left(self) -> int:
        """How many images it left right."""
        return int(self.correct.sum())

    def record(self) -> dict[str, Any]:
        """Name, counts and settings, as JSON types."""
        counts = {"correct": self.left, "num_samples": len(self.correct)}
        return {"kind": self.kind, "name": self.name, **counts, **self.settings}


def masking_check(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int = 50,
    num_restarts: int = 5,
    num_queries: int = 1000,
    sources: Mapping[str, nn.Module] | None = None,
    batch_size: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack a network in ways that must not beat each other, and say where one does.

    Robust accuracy is only as good as the attack. A network whose gradients vanish, are quantised
    away or point nowhere looks robust to PGD and is not. What must hold for every network whose
    gradients can be trusted, and what is checked:

    - ``gradient``: the loss has a gradient at (nearly) every image;
    - ``steps``: one large step breaks no more than ``num_steps`` small ones, nor do fewer steps;
    - ``restarts``: the outcome does not hang on the random start;
    - ``radius``: a larger ball never leaves more images right;
    - ``full range``: with no limit but [0, 1], (nearly) nothing is left right;
    - ``random``: random points of the ball break no more than the gradient attack;
    - ``black-box``: neither does Square, which sees no gradient;
    - ``transfer``: nor do examples made for another network.

    "Breaks more" is decided on pairs: of the images that only one of two attacks breaks, so many
    fall to the weaker attack that a fair coin would give it with probability below 0.01.

    Args:
        model: the network, in any mode; its ``adv`` branch is attacked.
        images: float32 images and labels on the model's device.
        threat: ball of the attacks, eps > 0.
        num_steps: of PGD with step size eps / 4, >= 2.
        num_restarts: independent runs of PGD, >= 2.
        num_queries: of Square for each image; 0 leaves it out.
        sources: other networks by name, whose adversarial examples are tried.
        batch_size: samples at a time.
        seed: of every attack; the global random state stays as it was.
        progress: told what is running.

    Returns:
        JSON types: ``attacks``, what each left right; ``checks``, each with its name, "passed" and
        a sentence; "passed", whether all did.

    Raises:
        ValueError: an argument out of range.

    Source: the signs of Athalye, Carlini and Wagner, ICML 2018 (arXiv 1802.00420), section 3.1, and
    of Carlini et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705).
    """
    if not (threat.eps > 0 and num_steps >= 2 and num_restarts >= 2 and num_queries >= 0):
        raise ValueError(
            "a radius > 0, num_steps >= 2, num_restarts >= 2 and num_queries >= 0 are expected, "
            f"got {threat.eps}, {num_steps}, {num_restarts} and {num_queries}"
        )
    check_images(images.x)
    attacks = _Attacks(model, images, threat, batch_size, seed, progress)
    zero = attacks.without_gradient()
    single = attacks.single_step()
    fewer = [attacks.pgd(steps) for steps in (1, 2, 5, 10, 20, 50, 100) if steps < num_steps]
    many = attacks.pgd(num_steps)
    restarted = attacks.pgd(num_steps, num_restarts)
    gained = int((many.correct & ~restarted.correct).sum())

    ladder = {
        eps: many
        if eps == threat.eps
        else attacks.pgd(num_steps, threat=ThreatModel(eps, threat.norm))
        for eps in sorted({threat.eps, *radii(threat, images.x[0].numel())})
    }
    balls = [tried._replace(name=f"radius {eps:.3g}") for eps, tried in ladder.items()]
    full = balls[-1]

    rivals = [attacks.random()]
    if num_queries:
        rivals.append(attacks.square(num_queries))
    rivals += [attacks.transfer(*source, num_steps) for source in (sources or {}).items()]

    n = len(images.y)
    checks = [
        at_most("gradient", zero, n, f"The loss has no gradient at {zero} of {n} images"),
        not_beaten("steps", [(weak, many) for weak in (single, *fewer)]),
        at_most("restarts", gained, n, f"{restarted.name} break {gained} images more than one run"),
        not_beaten("radius", list(itertools.pairwise(balls))),
        at_most(
            "full range",
            full.left,
            n,
            f"With no limit but [0, 1] the attack leaves {full.left} of {n} right",
        ),
        *(not_beaten(rival.kind, [(rival, restarted)]) for rival in rivals),
    ]
    return {
        "norm": threat.norm,
        "eps": threat.eps,
        "num_samples": n,
        "clean_correct": int(attacks.clean.sum()),
        "attacks": [each.record() for each in (single, *fewer, many, restarted, *rivals)],
        "radii": [{"eps": eps, "correct": tried.left} for eps, tried in ladder.items()],
        "checks": checks,
        "passed": all(entry["passed"] for entry in checks),
    }


def radii(threat: ThreatModel, num_pixels: int) -> list[float]:
    """Radii from half of eps on, doubled, up to the one that any image of so many values can be
    reached in."""
    full = threat.ball.reach(num_pixels)
    values = [threat.eps / 2]
    while 2 * values[-1] < 0.9 * full:
        values.append(2 * values[-1])
    return [*values, full]


def sign_test(only_weak: int, only_strong: int) -> float:
    """Probability that a fair coin gives the weaker of two attacks ``only_weak`` wins or more, of
    the images that one of them alone has broken."""
    from scipy.stats import binomtest  # A second at start-up, which most commands do without.

    n = only_weak + only_strong
    return float(binomtest(only_weak, n, alternative="greater").pvalue) if n else 1.0


def at_most(name: str, count: int, num_samples: int, text: str) -> dict[str, Any]:
    """The check that no more than a share of the images has a property.

    Args:
        name: "gradient", "restarts" or "full range".
        count, num_samples: images with the property, and all images.
        text: says the count, without a full stop.
    """
    limit, number, warning = _SHARES[name]
    passed = count / num_samples <= limit
    text += "." if passed else warning
    return {"name": name, "passed": passed, "text": text, number: count}


def not_beaten(name: str, pairs: Sequence[tuple[Tried, Tried]]) -> dict[str, Any]:
    """The check that no rival breaks more than the attack that must be the stronger one.

    Args:
        name: "steps", "radius", "random", "black-box" or "transfer".
        pairs: rival and stronger attack; the one least likely by chance is told of.
    """
    counted = [
        (int((a.correct & ~r.correct).sum()), int((r.correct & ~a.correct).sum()), r, a)
        for r, a in pairs
    ]
    only_rival, only_white, rival, white = min(counted, key=lambda c: sign_test(*c[:2]))
    passed = sign_test(only_rival, only_white) >= SIGNIFICANCE
    left = (
        f"{each.left} of {len(each.correct)} right after {each.name}" for each in (rival, white)
    )
    text = (
        f"{', '.join(left)}; {only_rival} images are broken by the first alone, {only_white} by "
        "the second."
    )
    if not passed:
        text += f" {_RIVALS[name]}"
    numbers = {"only_rival": only_rival, "only_white": only_white}
    return {"name": name, "passed": passed, "text": text, **numbers}


@dataclass(frozen=True)
class _Attacks:
    """The attacks on one set of images."""

    model: nn.Module
    images: ImageSet
    threat: ThreatModel
    batch_size: int
    seed: int
    progress: Progress | None

    @cached_property
    def clean(self) -> Tensor:
        """(N,) bool, what is right as it is."""
        with evaluation_mode(self.model):
            found = predict(self.model, self.images.x, self.batch_size).argmax(dim=1)
        return found == self.images.y

    def without_gradient(self) -> int:
        """The number of images at which the loss has no gradient."""
        zero = 0
        with evaluation_mode(self.model):
            for x, y in self.images.split(self.batch_size):
                x = x.detach().clone().requires_grad_()
                loss = F.cross_entropy(self.model(x), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, x)
                zero += int((grad.flatten(1) == 0).all(dim=1).sum())
        return zero

    def single_step(self) -> Tried:
        """One step of length eps from the image itself."""
        eps = self.threat.eps
        attack = PGD(eps, eps, 1, self.threat.norm, random_start=False, bn="running")
        settings = {"num_steps": 1, "alpha": eps}
        return self._tried(
            "gradient", "one step of length eps", settings, lambda x, y: [attack(self.model, x, y)]
        )

    def pgd(
        self, num_steps: int, num_restarts: int = 1, threat: ThreatModel | None = None
    ) -> Tried:
        threat = threat or self.threat
        settings: dict[str, Any] = {"num_steps": num_steps, "num_restarts": num_restarts}
        settings["alpha"] = threat.eps / 4
        result = pgd_accuracy(
            self.model,
            self.images,
            threat,
            **settings,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=self.progress,
        )
        name = f"PGD-{num_steps}" + (f", {num_restarts} restarts" if num_restarts > 1 else "")
        return Tried("gradient", name, result.correct, settings)

    def random(self) -> Tried:
        """Random points of the ball: its corners in L∞, its surface else."""
        generator, farthest = self._generator(), self.threat.ball.farthest

        def draws(x: Tensor, y: Tensor) -> Iterator[Tensor]:
            for _ in range(_RANDOM_DRAWS):
                draw = torch.randn(x.shape, generator=generator, device=x.device)
                yield (x + farthest(draw, self.threat.eps)).clamp(0, 1)

        name = f"{_RANDOM_DRAWS} random points"
        return self._tried("random", name, {"num_draws": _RANDOM_DRAWS}, draws)

    def square(self, num_queries: int) -> Tried:
        from pyautoattack.square import SquareAttack

        left = self.clean.clone()
        device = self.images.x.device
        devices = [device] if device.type == "cuda" else []
        alive = left.nonzero().flatten()
        with torch.random.fork_rng(devices=devices), evaluation_mode(self.model):
            for done, chunk in enumerate(torch.split(alive, self.batch_size)):
                if self.progress is not None:
                    self.progress("Square", done * self.batch_size, len(alive))
                attack = SquareAttack(
                    self.model,
                    norm=self.threat.norm,
                    n_queries=num_queries,
                    eps=self.threat.eps,
                    seed=self.seed,
                    resc_schedule=True,
                    device=device,
                )
                x, y = self.images.x[chunk], self.images.y[chunk]
                left[chunk] = accept(self.model, x, y, attack.perturb(x, y), self.threat)[0]
        return Tried("black-box", f"Square, {num_queries} queries", left, {"queries": num_queries})

    def transfer(self, name: str, source: nn.Module, num_steps: int) -> Tried:
        """Adversarial examples made for another network."""
        eps = self.threat.eps
        attack = PGD(eps, eps / 4, num_steps, self.threat.norm, bn="running")
        start = RandomStart(self._generator())

        def examples(x: Tensor, y: Tensor) -> list[Tensor]:
            with evaluation_mode(source):
                return [attack(source, x, y, start)]

        settings = {"source": name, "num_steps": num_steps}
        return self._tried("transfer", f"examples made for {name}", settings, examples)

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.images.x.device).manual_seed(self.seed)

    def _tried(
        self,
        kind: str,
        name: str,
        settings: dict[str, Any],
        candidates: Callable[[Tensor, Tensor], Iterable[Tensor]],
    ) -> Tried:
        """What is right as it is and as every candidate, which count inside the ball only."""
        correct = []
        with evaluation_mode(self.model):
            for x, y in self.images.split(self.batch_size):
                left = torch.ones_like(y, dtype=torch.bool)
                for candidate in candidates(x, y):
                    left &= accept(self.model, x, y, candidate, self.threat)[0]
                correct.append(left)
        return Tried(kind, name, torch.cat(correct) & self.clean, settings)
