"""AutoAttack (Croce and Hein, 2020), through its reference code."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import check_images
from arat_fast.attacks.square import SquareLinf
from arat_fast.device import no_algorithm_search
from arat_fast.display import SuiteProgress
from arat_fast.doctor import FOLD
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    ThreatModel,
    accept,
    evaluation_mode,
    finite_answers,
    predict,
)
from arat_fast.evaluation.parallel import SharedNetwork, Stopped, shared_batches
from arat_fast.evaluation.pieces import Pieces, Tensors
from arat_fast.models.folding import FoldedNetwork
from arat_kernels.implementation import is_replaced

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")
"""AutoAttack's version "rand", for networks that draw random numbers."""
NUM_DRAWS = 20
"""Passes whose gradients "rand" averages at every step (expectation over transformation)."""
NUM_STEPS = 100
NUM_TARGETS = 9
NUM_QUERIES = 5000
MIN_CLASSES = 4
FOR_ANY_CLASSES = {"apgd-ce", "square"}
"""Attacks without the DLR loss, which two or three classes are enough for."""
SHORT_STEPS = 10
RANDOMISED = 1e-4
"""Difference of two equal calls, relative to the largest logit, that is more than rounding."""
Version = Literal["standard", "torchattacks10", "rand"]
_TITLES: dict[Version, str] = {
    "standard": "AutoAttack",
    "torchattacks10": "AutoAttack (torchattacks, 10 steps)",
    "rand": "AutoAttack (rand)",
}


def autoattack(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    batch_size: int,
    version: Version = "standard",
    attacks: Sequence[str] = STANDARD,
    seed: int = 0,
    fast: bool = True,
    pieces: Pieces | None = None,
    progress: SuiteProgress | None = None,
) -> AttackResult:
    """Accuracy of the ``adv`` branch under AutoAttack.

    APGD on the cross-entropy (100 steps), targeted APGD on the DLR loss (9 targets, 100 steps),
    targeted FAB (9 targets, 100 steps) and Square (5,000 queries), each on what the ones before
    left standing. With fewer than ten classes, all the other classes are targets. In L1 APGD starts
    from larger balls, five times on the cross-entropy, and aims at five classes.

    The fast path attacks the network in float32 with its BatchNorm folded into the convolutions,
    and Square asks each question once. Nothing is left out: what a success is, is decided by the
    network itself in float32, and an image that only the folded network lost is attacked again on
    the network itself. What survives has been through every attack in full.

    Version "torchattacks10" is weaker, overstates robustness and is for comparison with the table
    of arXiv 2402.14648 only, which was measured with torchattacks 3.5.1: APGD and FAB run 10 steps,
    all the other classes are targets however many there are, and Square adapts its schedule to the
    number of queries.

    Version "rand" is for networks that answer the same image differently: APGD on the cross-entropy
    and on the untargeted DLR loss, with the mean gradient of 20 draws at every step. Each answer
    that decides, before and after an attack, is one draw.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attack.
        batch_size: samples attacked at once, >= 1.
        version: "standard", "torchattacks10" or "rand".
        attacks: those of the four to run, in this order; fewer are not AutoAttack. "rand" has its
            own two.
        seed: of every attack. The global random state is left as it was.
        fast: take the fast path; otherwise the reference code as it is, on the network itself.
        pieces: what is finished already; each attack on each batch is one piece.
        progress: told the attack, its forward passes so far and how many there can be, the images
            not yet fooled and the time left; called at every forward pass.

    Returns:
        The survivors, also after each attack; ``details["attacks"]`` holds the accuracy after each,
        ``details["num_disputed"]`` the images that were attacked again.

    Raises:
        ValueError: unknown version or attack, fewer than 4 classes (the targeted DLR loss needs 4)
            and another attack than "apgd-ce" and "square", or images outside [0, 1].

    Source: Croce and Hein, ICML 2020 (arXiv 2003.01690), version "standard".
    """
    if version not in _TITLES:
        raise ValueError(f"version must be one of {', '.join(_TITLES)}, got {version!r}")
    check_images(images.x)
    num_classes = len(images.classes)
    if version == "rand":
        # A folded network would be another one, and threads would share its draws.
        attacks, fast = RAND, False
    if num_classes < MIN_CLASSES and not FOR_ANY_CLASSES.issuperset(attacks):
        raise ValueError(f"AutoAttack needs at least {MIN_CLASSES} classes, got {num_classes}")
    unknown = [name for name in attacks if name not in (*STANDARD, *RAND)]
    if unknown or not attacks:
        raise ValueError(f"attacks must be among {', '.join(STANDARD)}, got {list(attacks)}")
    title = _TITLES[version] if tuple(attacks) in (STANDARD, RAND) else "Of AutoAttack:"
    run = _Run(
        model, threat, batch_size, seed, num_classes, version, fast, attacks, title, progress
    )
    pieces = pieces or Pieces()
    after: dict[str, Tensor] = {}
    num_rejected = num_disputed = 0
    x_adv = images.x.clone()
    with ExitStack() as stack:
        stack.enter_context(private_random_state(images.x.device))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_algorithm_search())
        # What the network itself draws.
        torch.manual_seed(seed)
        network, not_folded = model, ""
        if fast:
            folded, not_folded = fast_network(model, images.x)
            if folded is not model:
                stack.enter_context(finite_answers(folded))
            network = stack.enter_context(shared_batches(folded, images.x[:batch_size]))
        robust = predict(model, images.x, batch_size).argmax(dim=1) == images.y
        for name in attacks:
            survivors = robust.nonzero().flatten()
            for number, indices in enumerate(torch.split(survivors, batch_size)):
                if len(indices) == 0:
                    continue
                start = number * batch_size
                run.begin(name, start, len(indices), len(survivors), int(robust.sum()))
                piece = partial(run.piece, name, network, images.x[indices], images.y[indices])
                kept = f"{version}-{'-'.join(attacks)}-{name}-{number}"
                found = pieces.get(kept, piece, images.x.device)
                broken = indices[~found["still"]]
                robust[broken] = False
                x_adv[broken] = found["x_adv"]
                rejected, disputed = found["counts"].tolist()
                num_rejected += rejected
                num_disputed += disputed
            after[name] = robust.clone()
    implementation = f"pyautoattack {metadata.version('pyautoattack')}"
    if "square" in attacks and run.own_square:
        own = "arat_fast.attacks.SquareLinf"
        implementation = own if tuple(attacks) == ("square",) else f"{implementation}, {own}"
    numbers = {
        "num_steps": 0 if tuple(attacks) == ("square",) else run.num_steps,
        "num_draws": NUM_DRAWS if version == "rand" else 0,
        "num_targets": run.num_targets if {"apgd-t", "fab-t"} & {*attacks} else 0,
        "num_queries": NUM_QUERIES if "square" in attacks else 0,
    }
    details = {
        "implementation": implementation,
        "path": "fast" if fast else "plain",
        "network": "folded" if fast and not not_folded else "eager",
        **({"eager_because": not_folded} if not_folded else {}),
        "precision": "float32",
        "version": version,
        "norm": threat.norm,
        "eps": threat.eps,
        **{name: number for name, number in numbers.items() if number},
        "seed": seed,
        "batch_size": batch_size,
        "attacks": {name: float(mask.double().mean()) for name, mask in after.items()},
        "num_rejected": num_rejected,
        "num_disputed": num_disputed,
    }
    return AttackResult(robust, x_adv, details, after)


@dataclass
class _Run:
    """Runs one attack after the other on batches of images, and tells how far it is; the fields are
    those of :func:`autoattack`."""

    model: nn.Module
    threat: ThreatModel
    batch_size: int
    seed: int
    num_classes: int
    version: Version
    fast: bool
    attacks: Sequence[str]
    title: str
    progress: SuiteProgress | None
    spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.short = self.version == "torchattacks10"
        self.num_steps = SHORT_STEPS if self.short else NUM_STEPS
        others = self.num_classes - 1
        self.num_targets = others if self.short else min(NUM_TARGETS, others)
        self.apgd_targets = others if self.short else min(self.threat.ball.num_targets, others)
        # Square that asks each question once.
        self.own_square = self.fast and self.threat.norm == SquareLinf.norm

    def piece(self, name: str, network: nn.Module, x: Tensor, y: Tensor) -> Tensors:
        """Attack ``network``; what only that loses is attacked again on the network itself.

        Returns:
            "still" (n,) bool: the network itself classifies them correctly; "x_adv": of the others;
            "counts": examples outside the ball, and images that were attacked again.
        """
        candidates = self.attack(name, network, x, y)
        still, x_adv, rejected = accept(self.model, x, y, candidates, self.threat)
        disputed = torch.zeros_like(still)
        if network is not self.model:
            lost = predict(network, candidates, self.batch_size).argmax(dim=1) != y
            disputed = still & lost & self.threat.allows(x, candidates)
        if disputed.any():
            x, y = x[disputed], y[disputed]
            candidates = self.attack(name, self.model, x, y)
            again = accept(self.model, x, y, candidates, self.threat)
            still[disputed], x_adv[disputed] = again[:2]
            rejected += again[2]
        counts = torch.tensor([rejected, int(disputed.sum())])
        return {"still": still, "x_adv": x_adv[~still], "counts": counts}

    def attack(self, name: str, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What the attack returns, unchecked."""
        own_square = name == "square" and self.own_square
        # These draw nothing that depends on the other images, so that each thread takes them
        # through all steps on its own images.
        by_parts = name == "fab-t" or own_square
        shared = network if by_parts and isinstance(network, SharedNetwork) else None
        attacked = network if shared is None else shared.network
        passes, parts = itertools.count(1), 1 if shared is None else shared.count(x)

        def tick(*_: object) -> None:
            if shared is not None and shared.stopped.is_set():
                raise Stopped
            self.tick(-(-next(passes) // parts))

        with attacked.register_forward_pre_hook(tick):
            if own_square:
                square = SquareLinf(
                    self.threat.eps,
                    num_queries=NUM_QUERIES,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    rescale_schedule=self.short,
                )
                return square(attacked, x, y, share=None if shared is None else shared.map_parts)
            reference = partial(self._reference, name, attacked)
            return reference(x, y) if shared is None else shared.map_parts(reference, x, y)

    def _reference(self, name: str, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The reference code's attack."""
        from pyautoattack import AutoAttack

        # It tells of settings that are changed below.
        logging.getLogger("auto-attack").setLevel(logging.WARNING)
        adversary = AutoAttack(
            network,
            norm=self.threat.norm,
            eps=self.threat.eps,
            seed=self.seed,
            device=x.device,
            version="rand" if self.version == "rand" else "standard",
        )
        adversary.apgd_targeted.n_target_classes = self.apgd_targets
        adversary.fab.n_target_classes = self.num_targets
        adversary.square.n_queries = NUM_QUERIES
        if self.short:
            _shorten(adversary)
        adversary.attacks_to_run = [name]
        found: Tensor = adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return found

    def passes(self, name: str) -> int:
        """Forward passes of one image that withstands an attack."""
        if name == "square":
            return NUM_QUERIES
        restarts = 1 if self.version == "rand" else self.threat.ball.num_restarts
        own = {"apgd-ce": restarts, "apgd-dlr": 1, "apgd-t": self.apgd_targets}
        runs = own.get(name, self.num_targets)
        of_step = {"fab-t": 2}.get(name, NUM_DRAWS if self.version == "rand" else 1)
        return runs * (of_step * self.num_steps + 2)

    def begin(self, name: str, done: int, images: int, total: int, standing: int) -> None:
        """A batch of ``images`` of an attack's ``total`` begins, ``done`` are done."""
        self.name, self.done, self.images, self.total = name, done, images, total
        self.standing, self.before = standing, 0
        self.timed = self.spent > 0
        number = list(self.attacks).index(name) + 1
        self.label = f"{self.title} {name} ({number} of {len(self.attacks)})"
        later = [each for each in self.attacks[number:] if each != "square"]
        self.later = standing * sum(self.passes(each) * _WEIGHTS.get(each, 2) for each in later)
        # What it skips is not known before.
        self.then = ", then Square" if "square" in self.attacks[number:] else ""

    def tick(self, number: int) -> None:
        """The batch is at that forward pass, counted from 1."""
        if self.progress is None:
            return
        passes, weight = self.passes(self.name), _WEIGHTS.get(self.name, 2)
        # The reference code makes a few passes more, to see what it attacks.
        number = min(number, passes)
        self.spent += (number - self.before) * self.images * weight
        self.before = number
        # Batches as if each had as many images as this one.
        done = self.done * passes + number * self.images
        all_passes = self.total * passes
        left = (all_passes - done) * weight + self.later
        seconds = left * (time.perf_counter() - self.started) / self.spent if self.spent else 0.0
        note = f"attacks {self.standing} images"
        if self.timed or number > _FIRST_PASSES:
            note += f", at this speed at most {timedelta(seconds=round(seconds))} left{self.then}"
        self.progress(self.label, done, all_passes, "passes", note)


_WEIGHTS = {"fab-t": 1.5, "square": 1.0}
"""Passes that a forward pass of an attack stands for, with its share of backward ones; 2 of the
others."""
_FIRST_PASSES = 10
"""Of the first batch, before which the speed is not known."""


def fast_network(model: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """The network with its BatchNorm folded, or itself and why that cannot be done."""
    if is_replaced(FOLD):
        return model, "the self-check found the folded network wrong on this card"
    try:
        folded = FoldedNetwork(model, x, constant=True)
    except ValueError as error:
        return model, str(error).partition("; set step.fold")[0]
    for module in (folded, *folded.modules()):
        module.training = False
    return folded, ""


def _shorten(adversary: Any) -> None:
    """Give the reference code's attacks the settings of torchattacks 3.5.1."""
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        apgd.n_iter = SHORT_STEPS
        # Its checkpoints are shares of the steps, computed when it was made.
        apgd.n_iter_2 = max(int(0.22 * SHORT_STEPS), 1)
        apgd.n_iter_min = max(int(0.06 * SHORT_STEPS), 1)
        apgd.size_decr = max(int(0.03 * SHORT_STEPS), 1)
    adversary.fab.n_iter = SHORT_STEPS
    adversary.square.rescale_schedule = True


@torch.no_grad()
def is_randomised(model: nn.Module, images: ImageSet) -> bool:
    """Whether two equal calls of the ``adv`` branch differ by more than rounding on the first 32
    images; of none the answer is no."""
    x = images.x[:32]
    if not len(x):
        return False
    with private_random_state(x.device), evaluation_mode(model):
        first, second = model(x), model(x)
    return bool((first - second).abs().max() > RANDOMISED * first.abs().max())


@contextmanager
def private_random_state(device: torch.device) -> Iterator[None]:
    """The reference code reseeds global generators; put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
