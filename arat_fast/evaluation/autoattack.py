"""AutoAttack (Croce and Hein, 2020), through its reference code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import check_images
from arat_fast.attacks.square import SquareLinf
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    Progress,
    accept,
    evaluation_mode,
    predict,
)
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.models.folding import FoldedNetwork

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
NUM_TARGETS = 9
NUM_QUERIES = 5000
MIN_CLASSES = 4
SHORT_STEPS = 10
Version = Literal["standard", "torchattacks10"]


def autoattack(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    batch_size: int,
    version: Version = "standard",
    seed: int = 0,
    fast: bool = True,
    progress: Progress | None = None,
) -> AttackResult:
    """Accuracy of the ``adv`` branch under AutoAttack.

    APGD on the cross-entropy (100 steps), targeted APGD on the DLR loss (9 targets, 100 steps),
    targeted FAB (9 targets, 100 steps) and Square (5,000 queries), each on what the ones before
    left standing. With fewer than ten classes, all the other classes are targets.

    The fast path attacks the network in float32 with its BatchNorm folded into the convolutions,
    and Square asks each question once. Nothing is left out: what a success is, is decided by the
    network itself in float32, and an image that only the folded network lost is attacked again on
    the network itself. What survives has been through every attack in full.

    Version "torchattacks10" is weaker, overstates robustness and is for comparison with the table
    of arXiv 2402.14648 only, which was measured with torchattacks 3.5.1: APGD and FAB run 10 steps,
    all the other classes are targets however many there are, and Square adapts its schedule to the
    number of queries.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attack.
        batch_size: samples attacked at once, >= 1.
        version: "standard", or "torchattacks10".
        seed: of every attack. The global random state is left as it was.
        fast: take the fast path; otherwise the reference code as it is.
        progress: told the name of the attack, the forward passes so far and the survivors; called
            at every forward pass.

    Returns:
        The survivors; ``details["attacks"]`` holds the accuracy after each attack,
        ``details["num_disputed"]`` the images that were attacked again.

    Raises:
        ValueError: unknown version, fewer than 4 classes (the DLR loss needs 4), or images outside
            [0, 1].

    Source: Croce and Hein, ICML 2020 (arXiv 2003.01690), version "standard".
    """
    if version not in ("standard", "torchattacks10"):
        raise ValueError(f'version must be "standard" or "torchattacks10", got {version!r}')
    check_images(images.x)
    num_classes = len(images.classes)
    if num_classes < MIN_CLASSES:
        raise ValueError(f"AutoAttack needs at least {MIN_CLASSES} classes, got {num_classes}")
    short = version == "torchattacks10"
    num_targets = num_classes - 1 if short else min(NUM_TARGETS, num_classes - 1)
    title = "AutoAttack (torchattacks, 10 steps)" if short else "AutoAttack"
    after: dict[str, float] = {}
    rejected = disputes = 0
    x_adv = images.x.clone()
    with _private_random_state(images.x.device), evaluation_mode(model):
        network = _fast_network(model, images.x) if fast else model
        robust = predict(model, images.x, batch_size).argmax(dim=1) == images.y

        def attack(name: str, attacked: nn.Module, indices: Tensor) -> Tensor:
            """Take what is broken out of ``robust``; those lost by ``attacked`` alone."""
            nonlocal rejected
            ticking = _Ticking(attacked, f"{title} {name}", len(indices), progress)
            x, y = images.x[indices], images.y[indices]
            if name == "square" and threat.norm == "Linf" and fast:
                candidates = _square(ticking, x, y, threat, batch_size, seed, short)
            else:
                adversary = _reference(ticking, threat, seed, num_targets, short)
                adversary.attacks_to_run = [name]
                candidates, _ = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
            disputed = []
            for chunk in torch.split(torch.arange(len(indices), device=x.device), batch_size):
                still, adversarial, outside = accept(
                    model, x[chunk], y[chunk], candidates[chunk], threat
                )
                broken = indices[chunk[~still]]
                robust[broken] = False
                x_adv[broken] = adversarial[~still]
                rejected += outside
                if attacked is not model:
                    lost = predict(attacked, candidates[chunk], batch_size).argmax(dim=1)
                    disputed.append(indices[chunk[still & (lost != y[chunk])]])
            return torch.cat(disputed) if disputed else indices[:0]

        for name in STANDARD:
            survivors = robust.nonzero().flatten()
            if len(survivors):
                disputed = attack(name, network, survivors)
                disputes += len(disputed)
                if len(disputed):
                    attack(name, model, disputed)
            after[name] = float(robust.double().mean())
    details = {
        "implementation": f"pyautoattack {metadata.version('pyautoattack')}",
        "path": "fast" if fast else "plain",
        "network": "folded" if isinstance(network, FoldedNetwork) else "eager",
        "precision": "float32",
        "version": version,
        "norm": threat.norm,
        "eps": threat.eps,
        "num_steps": SHORT_STEPS if short else 100,
        "num_targets": num_targets,
        "num_queries": NUM_QUERIES,
        "seed": seed,
        "attacks": after,
        "num_rejected": rejected,
        "num_disputed": disputes,
    }
    return AttackResult(robust, x_adv, details)


def _fast_network(model: nn.Module, x: Tensor) -> nn.Module:
    """The network with its BatchNorm folded, or itself where that cannot be done."""
    try:
        folded = FoldedNetwork(model, x, constant=True)
    except ValueError:
        return model
    for module in (folded, *folded.modules()):
        module.training = False
    return folded


def _reference(
    model: nn.Module, threat: ThreatModel, seed: int, num_targets: int, short: bool
) -> Any:
    """The reference code's AutoAttack."""
    from pyautoattack import AutoAttack

    adversary = AutoAttack(
        model,
        norm=threat.norm,
        eps=threat.eps,
        seed=seed,
        device=next(model.parameters()).device,
        version="standard",
    )
    adversary.apgd_targeted.n_target_classes = num_targets
    adversary.fab.n_target_classes = num_targets
    adversary.square.n_queries = NUM_QUERIES
    if short:
        _shorten(adversary)
    return adversary


def _square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    batch_size: int,
    seed: int,
    short: bool,
) -> Tensor:
    """Square on the batches that the reference code makes: it draws for each of them anew."""
    attack = SquareLinf(
        threat.eps,
        num_queries=NUM_QUERIES,
        seed=seed,
        batch_size=batch_size,
        rescale_schedule=short,
    )
    pairs = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    return torch.cat([attack(model, images, labels) for images, labels in pairs])


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


class _Ticking(nn.Module):
    """The model, reporting each of its forward passes."""

    def __init__(
        self, model: nn.Module, name: str, survivors: int, progress: Progress | None
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.survivors = survivors
        self.progress = progress
        self.passes = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.progress is not None:
            self.progress(self.name, self.passes, self.survivors)
        logits: Tensor = self.model(x)
        return logits


@contextmanager
def _private_random_state(device: torch.device) -> Iterator[None]:
    """The reference code reseeds global generators; put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
