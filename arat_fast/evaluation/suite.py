"""All accuracies of one network, and examples to look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.distributed import ALONE, Ranks
from arat_fast.distributed.evaluation import share_evaluation
from arat_fast.evaluation.autoattack import Version, autoattack
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    Progress,
    clean_accuracy,
    evaluation_mode,
    pgd_accuracy,
    predict,
)
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.files import write_atomic
from arat_fast.models.split_batch_norm import SplitBatchNorm2d

NUM_EXAMPLES = 16


@dataclass(frozen=True)
class SuiteResult:
    """Results by name ("clean", "clean_branch", "pgd20", "autoattack", "aa-torchattacks10"), in the
    order they ran."""

    results: dict[str, AttackResult]

    def record(self) -> dict[str, dict[str, Any]]:
        """Accuracies, counts and how they were measured, as JSON types."""
        return {name: result.record() for name, result in self.results.items()}

    def strongest_examples(self) -> Tensor:
        """AutoAttack's example where it broke an image that PGD did not, else PGD's."""
        (pgd,) = [r for name, r in self.results.items() if name.startswith("pgd")]
        if "autoattack" not in self.results:
            return pgd.x_adv
        full = self.results["autoattack"]
        better = pgd.correct & ~full.correct
        return torch.where(better.view(-1, 1, 1, 1), full.x_adv, pgd.x_adv)


def evaluate_all(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int,
    alpha: float,
    with_autoattack: bool,
    batch_size: int,
    seed: int,
    num_restarts: int = 1,
    with_torchattacks10: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> SuiteResult:
    """Clean, PGD and AutoAttack accuracy of the ``adv`` branch, and clean accuracy of the other.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attacks.
        num_steps, alpha: steps and step size of PGD.
        with_autoattack: whether to run AutoAttack.
        batch_size: samples at a time.
        seed: of the attacks.
        num_restarts: of PGD.
        with_torchattacks10: whether to run the 10-step AutoAttack too, which overstates robustness
            and is for comparison with the paper's table only.
        progress: told what is running.
        ranks: the processes that share the images; each returns all results.
    """
    share = partial(share_evaluation, ranks)
    clean = partial(clean_accuracy, model, batch_size=batch_size)
    results = {"clean": share(clean, images)}
    if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        results["clean_branch"] = share(partial(clean, branch="clean"), images)
    results[f"pgd{num_steps}"] = share(
        lambda own: pgd_accuracy(
            model,
            own,
            threat,
            num_steps=num_steps,
            alpha=alpha,
            batch_size=batch_size,
            num_restarts=num_restarts,
            seed=seed,
            progress=progress,
        ),
        images,
    )
    versions: list[tuple[str, Version]] = []
    if with_autoattack:
        versions.append(("autoattack", "standard"))
    if with_torchattacks10:
        versions.append(("aa-torchattacks10", "torchattacks10"))
    for name, version in versions:
        attack = partial(
            autoattack,
            model,
            threat=threat,
            batch_size=batch_size,
            version=version,
            seed=seed,
            progress=progress,
        )
        results[name] = share(attack, images)
    return SuiteResult(results)


def save_examples(path: Path, model: nn.Module, images: ImageSet, x_adv: Tensor) -> None:
    """Write the first images of the set, their adversarial versions and the predictions (.npz).

    Args:
        path: the file.
        model: the network.
        images: the images; the first 16 are taken.
        x_adv: adversarial images, same order as ``images``.
    """
    x, y = images.x[:NUM_EXAMPLES], images.y[:NUM_EXAMPLES]
    adversarial = x_adv[:NUM_EXAMPLES]
    arrays: dict[str, Any] = {"x": x, "x_adv": adversarial, "y": y}
    with evaluation_mode(model):
        for name, inputs in (("clean", x), ("adv", adversarial)):
            probability, prediction = predict(model, inputs, len(inputs)).softmax(dim=1).max(dim=1)
            arrays[f"pred_{name}"] = prediction
            arrays[f"prob_{name}"] = probability
    arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
    write_atomic(path, lambda f: np.savez(f, **arrays, classes=np.array(images.classes)))
