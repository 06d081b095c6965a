"""Is the robustness real? Signs of gradients that are masked rather than useless to an attack."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, RandomStart, check_images
from arat_fast.evaluation.evaluate import (
    ImageSet,
    Progress,
    accept,
    evaluation_mode,
    pgd_accuracy,
    predict,
)
from arat_fast.evaluation.threat_model import ThreatModel

SIGNIFICANCE = 0.01
"""A weaker attack counts as stronger below this p-value of the one-sided sign test."""
ZERO_GRADIENTS = 0.05
"""Largest share of images without any gradient that is no warning."""
RESTART_GAIN = 0.1
"""Largest share of images broken by restarts alone that is no warning."""
LEFT_AT_FULL_RANGE = 0.02
"""Largest share of images left right by an attack without limit that is no warning."""

_RANDOM_DRAWS = 100
_STRONGER = {
    "random": "It takes no gradient to find what the gradient does not.",
    "black-box": "An attack that sees no gradient is the stronger one.",
    "transfer": "The other network’s gradient is the better guide.",
}
"""What is said where an attack of a kind breaks more than PGD with restarts."""


@dataclass(frozen=True)
class Tried:
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

    def record(self) -> dict[str, Any]:
        """Name, counts and settings, as JSON types."""
        return {
            "kind": self.kind,
            "name": self.name,
            "correct": int(self.correct.sum()),
            "num_samples": len(self.correct),
            **self.settings,
        }


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
    if not threat.eps > 0:
        raise ValueError(f"the masking check needs a radius > 0, got eps {threat.eps}")
    if num_steps < 2 or num_restarts < 2 or num_queries < 0:
        raise ValueError(
            "num_steps >= 2, num_restarts >= 2 and num_queries >= 0 are expected, got "
            f"{num_steps}, {num_restarts} and {num_queries}"
        )
    check_images(images.x)
    check = _Check(model, images, threat, batch_size, seed, progress)
    checks = [check.gradient()]

    single = check.single_step()
    fewer = [check.pgd(steps) for steps in (1, 2, 5, 10, 20, 50, 100) if steps < num_steps]
    many = check.pgd(num_steps)
    restarted = check.pgd(num_steps, num_restarts)
    checks.append(
        _not_beaten(
            "steps",
            [(weak, many) for weak in (single, *fewer)],
            "Fewer steps break more: the way uphill does not lead on.",
        )
    )
    checks.append(_compare_restarts(many, restarted))

    ladder = {threat.eps: many}
    for eps in radii(threat, images.x[0].numel()):
        if eps not in ladder:
            ladder[eps] = check.pgd(num_steps, threat=ThreatModel(eps, threat.norm))
    ladder = dict(sorted(ladder.items()))
    balls = [dataclasses.replace(tried, name=f"radius {eps:.3g}") for eps, tried in ladder.items()]
    pairs = list(itertools.pairwise(balls))
    checks.append(_not_beaten("radius", pairs, "A larger ball leaves more right."))
    checks.append(_full_range(balls[-1]))

    rivals = [check.random()]
    if num_queries:
        rivals.append(check.square(num_queries))
    rivals += [check.transfer(name, source, num_steps) for name, source in (sources or {}).items()]
    checks += [_not_beaten(r.kind, [(r, restarted)], _STRONGER[r.kind]) for r in rivals]
    tried = [single, *fewer, many, restarted, *rivals]
    return {
        "norm": threat.norm,
        "eps": threat.eps,
        "num_samples": len(images.y),
        "clean_correct": int(check.clean.sum()),
        "attacks": [attack.record() for attack in tried],
        "radii": [{"eps": eps, "correct": int(t.correct.sum())} for eps, t in ladder.items()],
        "checks": checks,
        "passed": all(entry["passed"] for entry in checks),
    }


def radii(threat: ThreatModel, num_pixels: int) -> list[float]:
    """Radii from half of eps on, doubled, up to the one that any image can be reached in.

    Args:
        threat: the ball.
        num_pixels: values in an image, channels included.
    """
    full = 1.0 if threat.norm == "Linf" else math.sqrt(num_pixels)
    values = [threat.eps / 2]
    while 2 * values[-1] < 0.9 * full:
        values.append(2 * values[-1])
    return [*values, full]


def sign_test(only_weak: int, only_strong: int) -> float:
    """Probability that a fair coin gives the weaker attack ``only_weak`` wins or more.

    Args:
        only_weak, only_strong: images broken by one of two attacks alone, >= 0.
    """
    from scipy.stats import binomtest  # A second at start-up, which most commands do without.

    n = only_weak + only_strong
    return float(binomtest(only_weak, n, alternative="greater").pvalue) if n else 1.0


class _Check:
    """The attacks on one set of images."""

    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        threat: ThreatModel,
        batch_size: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.images = images
        self.threat = threat
        self.batch_size = batch_size
        self.seed = seed
        self.progress = progress
        with evaluation_mode(model):
            self.clean = predict(model, images.x, batch_size).argmax(dim=1) == images.y

    def gradient(self) -> dict[str, Any]:
        zero = 0
        with evaluation_mode(self.model):
            for x, y in self._batches():
                x = x.detach().clone().requires_grad_()
                loss = F.cross_entropy(self.model(x), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, x)
                zero += int((grad.flatten(1) == 0).all(dim=1).sum())
        share = zero / len(self.images.y)
        text = f"The loss has no gradient at {zero} of {len(self.images.y)} images"
        if share > ZERO_GRADIENTS:
            text += ": an attack that follows it stands still there."
        else:
            text += "."
        return _result("gradient", share <= ZERO_GRADIENTS, text, zero=zero)

    def single_step(self) -> Tried:
        """One step of length eps from the image itself."""
        attack = PGD(
            self.threat.eps,
            self.threat.eps,
            1,
            self.threat.norm,
            random_start=False,
            bn="running",
        )
        correct = []
        with evaluation_mode(self.model):
            for x, y in self._batches():
                correct.append(self._still(x, y, attack(self.model, x, y)))
        settings = {"num_steps": 1, "alpha": self.threat.eps}
        return self._tried("gradient", "one step of length eps", correct, settings)

    def pgd(
        self, num_steps: int, num_restarts: int = 1, threat: ThreatModel | None = None
    ) -> Tried:
        threat = threat or self.threat
        result = pgd_accuracy(
            self.model,
            self.images,
            threat,
            num_steps=num_steps,
            alpha=threat.eps / 4,
            num_restarts=num_restarts,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=self.progress,
        )
        name = f"PGD-{num_steps}" + (f", {num_restarts} restarts" if num_restarts > 1 else "")
        settings = {"num_steps": num_steps, "num_restarts": num_restarts, "alpha": threat.eps / 4}
        return Tried("gradient", name, result.correct, settings)

    def random(self) -> Tried:
        """Random points of the ball: its corners in L∞, its surface in L2."""
        generator = torch.Generator(self.images.x.device).manual_seed(self.seed)
        eps = self.threat.eps
        correct = []
        with evaluation_mode(self.model):
            for x, y in self._batches():
                left = torch.ones_like(y, dtype=torch.bool)
                for _ in range(_RANDOM_DRAWS):
                    draw = torch.randn(x.shape, generator=generator, device=x.device)
                    if self.threat.norm == "Linf":
                        delta = eps * draw.sign()
                    else:
                        delta = eps * draw / draw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                    left &= self._still(x, y, (x + delta).clamp(0, 1))
                correct.append(left)
        name = f"{_RANDOM_DRAWS} random points"
        return self._tried("random", name, correct, {"num_draws": _RANDOM_DRAWS})

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
                left[chunk] = self._still(x, y, attack.perturb(x, y))
        return Tried("black-box", f"Square, {num_queries} queries", left, {"queries": num_queries})

    def transfer(self, name: str, source: nn.Module, num_steps: int) -> Tried:
        attack = PGD(
            self.threat.eps, self.threat.eps / 4, num_steps, self.threat.norm, bn="running"
        )
        generator = torch.Generator(self.images.x.device).manual_seed(self.seed)
        correct = []
        for x, y in self._batches():
            with evaluation_mode(source):
                candidate = attack(source, x, y, RandomStart(generator))
            with evaluation_mode(self.model):
                correct.append(self._still(x, y, candidate))
        settings = {"source": name, "num_steps": num_steps}
        return self._tried("transfer", f"examples made for {name}", correct, settings)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.batch_size
        return zip(torch.split(self.images.x, size), torch.split(self.images.y, size), strict=True)

    def _still(self, x: Tensor, y: Tensor, candidate: Tensor) -> Tensor:
        """What is right as the candidate, which counts inside the ball only."""
        return accept(self.model, x, y, candidate, self.threat)[0]

    def _tried(self, kind: str, name: str, still: list[Tensor], settings: dict[str, Any]) -> Tried:
        """An attack on all images, of which those count as left that are right as they are too."""
        return Tried(kind, name, torch.cat(still) & self.clean, settings)


def _result(name: str, passed: bool, text: str, **numbers: Any) -> dict[str, Any]:
    return {"name": name, "passed": passed, "text": text, **numbers}


def _not_beaten(name: str, pairs: Sequence[tuple[Tried, Tried]], warning: str) -> dict[str, Any]:
    """The check that no rival breaks more than the attack that must be the stronger one.

    Args:
        name: of the check.
        pairs: rival and stronger attack; the one least likely by chance is told of.
        warning: said where a rival is the stronger one.
    """
    counted = [
        (int((a.correct & ~r.correct).sum()), int((r.correct & ~a.correct).sum()), r, a)
        for r, a in pairs
    ]
    only_rival, only_white, rival, white = min(counted, key=lambda c: sign_test(*c[:2]))
    passed = sign_test(only_rival, only_white) >= SIGNIFICANCE
    text = (
        f"{_left_words(rival)} after {rival.name}, {_left_words(white)} after {white.name}; "
        f"{only_rival} and {only_white} images are broken by one of them alone."
    )
    if not passed:
        text += f" {warning}"
    return _result(name, passed, text, only_rival=only_rival, only_white=only_white)


def _compare_restarts(once: Tried, restarted: Tried) -> dict[str, Any]:
    gained = int((once.correct & ~restarted.correct).sum())
    share = gained / len(once.correct)
    text = f"{restarted.name} break {gained} images more than one run."
    if share > RESTART_GAIN:
        text += " The outcome hangs on where the attack starts: the surface is rough."
    return _result("restarts", share <= RESTART_GAIN, text, gained=gained)


def _full_range(tried: Tried) -> dict[str, Any]:
    left = int(tried.correct.sum())
    passed = left <= LEFT_AT_FULL_RANGE * len(tried.correct)
    text = f"With no limit but [0, 1] the attack leaves {_left_words(tried)}"
    text += "." if passed else ", and any image can be made of any other: it does not find the way."
    return _result("full range", passed, text, left=left)


def _left_words(tried: Tried) -> str:
    return f"{int(tried.correct.sum())} of {len(tried.correct)} right"
