"""All accuracies of one network, and examples to look at."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arat_fast.device import describe_device, versions
from arat_fast.distributed import ALONE, Ranks
from arat_fast.evaluation.autoattack import MIN_CLASSES, autoattack
from arat_fast.evaluation.corruptions import CORRUPTIONS, NUM_SEVERITIES, corrupt
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    SuiteProgress,
    clean_accuracy,
    evaluation_mode,
    pgd_accuracy,
    predict,
)
from arat_fast.evaluation.pieces import Pieces, checksum
from arat_fast.evaluation.sharing import share_evaluation
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.files import write_atomic
from arat_fast.models.split_batch_norm import Branch, SplitBatchNorm2d
from arat_fast.statistics import Z_95
from arat_fast.stop import EvaluationStopped

NUM_EXAMPLES = 16


ATTACKS = ("pgd", "autoattack", "apgd-ce", "square", "aa-torchattacks10", "corruptions")
"""What an evaluation can hold beside the clean accuracy. "apgd-ce" and "square" are AutoAttack's
first and last attack alone; "aa-torchattacks10" overstates robustness and is for comparison with
the paper's table only."""
_OF_AUTOATTACK = ("autoattack", "apgd-ce", "square", "aa-torchattacks10")


@dataclass(frozen=True)
class CorruptionResult:
    """Accuracy on corrupted images.

    Attributes:
        correct: (corruptions, severities, N) bool.
        details: how it was done, as JSON types.
    """

    correct: Tensor
    details: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Mean and accuracy by corruption and severity, counts, a 95 % interval and details.

        The interval is the normal one of the images' mean accuracies: the corrupted copies of an
        image are no independent samples.
        """
        per_image = self.correct.double().mean(dim=(0, 1))
        value, count = float(per_image.mean()), len(per_image)
        half = Z_95 * float(per_image.std(correction=0)) / count**0.5
        accuracies = self.correct.double().mean(dim=2).tolist()
        return {
            "value": value,
            "correct": int(self.correct.sum()),
            "num_samples": self.correct.numel(),
            "interval": [max(0.0, value - half), min(1.0, value + half)],
            "corruptions": dict(zip(CORRUPTIONS, accuracies, strict=True)),
            **self.details,
        }


@dataclass(frozen=True)
class SuiteResult:
    """Results by name ("clean", "clean_branch", "pgd20", "autoattack", …), in the order they ran.

    Attributes:
        results: of the clean images and of each attack.
        corruptions: of the corrupted images, where they were asked for.
        left_out: attacks that were asked for and cannot be run, and why.
        pieces: what is kept on disk until the caller has written the results and removes it.
    """

    results: dict[str, AttackResult]
    corruptions: CorruptionResult | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    pieces: Pieces = field(default_factory=Pieces)

    def record(self) -> dict[str, dict[str, Any]]:
        """Accuracies, counts and how they were measured, as JSON types."""
        record = {name: result.record() for name, result in self.results.items()}
        if self.corruptions is not None:
            record["corruptions"] = self.corruptions.record()
        return record

    def strongest_examples(self) -> Tensor:
        """AutoAttack's example where it broke an image that PGD did not, else PGD's; of several
        processes those of rank 0, and on rank 0 only."""
        (pgd,) = [r for name, r in self.results.items() if name.startswith("pgd")]
        if "autoattack" not in self.results:
            return pgd.x_adv
        full = self.results["autoattack"]
        better = (pgd.correct & ~full.correct)[: len(pgd.x_adv)]
        return torch.where(better.view(-1, 1, 1, 1), full.x_adv, pgd.x_adv)


def attacks_left_out(attacks: Sequence[str], num_classes: int) -> dict[str, str]:
    """Those of ``attacks`` that cannot be run with so few classes, and why."""
    if num_classes >= MIN_CLASSES:
        return {}
    reason = f"AutoAttack's targeted loss needs at least {MIN_CLASSES} classes, got {num_classes}"
    return {name: reason for name in attacks if name in _OF_AUTOATTACK}


def evaluate_all(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int,
    alpha: float,
    attacks: Sequence[str],
    batch_size: int,
    seed: int,
    num_restarts: int = 1,
    folder: Path | None = None,
    progress: SuiteProgress | None = None,
    ranks: Ranks = ALONE,
) -> SuiteResult:
    """Clean accuracy of both branches, and accuracy of the ``adv`` branch under attacks.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device, this process's share of them.
        threat: ball of the attacks.
        num_steps, alpha: steps and step size of PGD.
        attacks: of :data:`ATTACKS`; those of :func:`attacks_left_out` are not run.
        batch_size: samples at a time.
        seed: of the attacks and of the corruptions.
        num_restarts: of PGD.
        folder: where finished pieces are kept; an interrupted evaluation of the same weights,
            images and settings goes on from them. They stay for the caller to remove, see
            :class:`SuiteResult`. None keeps nothing.
        progress: told what is running.
        ranks: the processes that share the images; each returns the results of all, adversarial
            images of its own share only, and keeps pieces of its own.

    Raises:
        ValueError: an attack is unknown, or an argument is out of range.
    """
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}, expected some of {', '.join(ATTACKS)}")
    left_out = attacks_left_out(attacks, len(images.classes))
    attacks = [name for name in attacks if name not in left_out]
    settings: dict[str, Any] = {
        "norm": threat.norm,
        "eps": threat.eps,
        "num_steps": num_steps,
        "alpha": alpha,
        "num_restarts": num_restarts,
        "batch_size": batch_size,
        "seed": seed,
        "versions": versions(),
        "device": describe_device(images.x.device),
    }
    pieces = Pieces()
    if folder is not None:
        if not ranks.alone:
            settings["processes"] = [ranks.rank, ranks.world_size]
        pieces = Pieces(folder, checksum(model, {"x": images.x, "y": images.y}, settings))
    share = partial(share_evaluation, ranks)
    clean = partial(clean_accuracy, model, batch_size=batch_size)
    results = {"clean": share(clean, images)}
    if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        results["clean_branch"] = share(partial(clean, branch="clean"), images)
    if "pgd" in attacks:
        pgd = partial(
            pgd_accuracy,
            model,
            threat=threat,
            num_steps=num_steps,
            alpha=alpha,
            batch_size=batch_size,
            num_restarts=num_restarts,
            seed=seed,
            pieces=pieces,
            progress=progress,
        )
        results[f"pgd{num_steps}"] = share(pgd, images)
    reference = partial(
        autoattack,
        model,
        threat=threat,
        batch_size=batch_size,
        seed=seed,
        pieces=pieces,
        progress=None if progress is None else partial(progress, unit="passes"),
    )
    if "autoattack" in attacks:
        results["autoattack"] = share(reference, images)
    for name in ("apgd-ce", "square"):
        if name in attacks:
            results[name] = share(partial(reference, attacks=(name,)), images)
    if "aa-torchattacks10" in attacks:
        results["aa-torchattacks10"] = share(partial(reference, version="torchattacks10"), images)
    corruptions = None
    if "corruptions" in attacks:
        corruptions = corruption_accuracy(
            model,
            images,
            batch_size=batch_size,
            seed=seed,
            pieces=pieces,
            progress=progress,
            ranks=ranks,
        )
    return SuiteResult(results, corruptions, left_out, pieces)


def corruption_accuracy(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int,
    seed: int = 0,
    pieces: Pieces | None = None,
    progress: SuiteProgress | None = None,
    ranks: Ranks = ALONE,
) -> CorruptionResult:
    """Accuracy of the ``adv`` branch on images with common corruptions, made on the fly.

    What is random in them depends on the number of processes.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device, this process's share of them.
        batch_size: samples at a time, >= 1.
        seed: of the corruptions.
        pieces: what is finished already; each corruption is one piece.
        progress: told after each corruption.
        ranks: the processes that share the images; each returns all results.

    Raises:
        EvaluationStopped: a process was told to stop; raised on all of them.
    """
    pieces = pieces or Pieces()
    correct = []

    def one(name: str) -> dict[str, Tensor]:
        predictions = [
            predict(model, corrupt(images.x, name, severity, seed=seed), batch_size).argmax(dim=1)
            for severity in range(1, NUM_SEVERITIES + 1)
        ]
        return {"correct": torch.stack(predictions) == images.y}

    stopped = False
    # A process may have no images.
    own = CORRUPTIONS if len(images.y) else ()
    try:
        with evaluation_mode(model):
            for number, name in enumerate(own, 1):
                found = pieces.get(f"corruption-{name}", partial(one, name), images.x.device)
                correct.append(found["correct"])
                if progress is not None:
                    progress("corruptions", number, len(own), "corruptions")
    except EvaluationStopped:
        if ranks.alone:
            raise
        stopped = True
    if not ranks.alone:
        ranks.meet()
        if not ranks.all(not stopped):
            raise EvaluationStopped
    none = images.y.new_empty((len(CORRUPTIONS), NUM_SEVERITIES, 0), dtype=torch.bool)
    by_name = torch.stack(correct) if correct else none
    by_name = ranks.gather_rows(by_name.permute(2, 0, 1)).permute(1, 2, 0)
    details = {
        "implementation": "arat_fast.evaluation.corruptions",
        "severities": list(range(1, NUM_SEVERITIES + 1)),
        "precision": "float32",
        "batch_size": batch_size,
        "seed": seed,
    }
    return CorruptionResult(by_name, details)


def per_example(
    model: nn.Module,
    images: ImageSet,
    suite: SuiteResult,
    batch_size: int,
    ranks: Ranks = ALONE,
) -> dict[str, NDArray[Any]]:
    """What became of each image, by name.

    ``label`` (N,) int64; for each result ``NAME_correct`` (N,) bool, ``NAME_prediction`` (N,) int64
    and ``NAME_margin`` (N,) float32, the true logit less the largest other one, on the image that
    :class:`AttackResult` keeps, and ``NAME_after_ATTACK`` (N,) bool, what stood after each attack
    of several; ``corruptions_correct`` (corruptions, severities, N) bool.

    Args:
        model: the network.
        images: this process's share of the images that were evaluated.
        suite: what was found.
        batch_size: samples at a time, >= 1.
        ranks: the processes that share the images; each calls this.
    """
    arrays = {"label": ranks.gather_rows(images.y)}
    for name, result in suite.results.items():
        branch: Branch = "clean" if name == "clean_branch" else "adv"
        # A process may have no images.
        prediction, margin = images.y, images.y.float()
        if len(images.y):
            with evaluation_mode(model, branch):
                logits = predict(model, result.x_adv, batch_size)
            true = logits.gather(1, images.y[:, None]).flatten()
            others = logits.scatter(1, images.y[:, None], -torch.inf).amax(dim=1)
            prediction, margin = logits.argmax(dim=1), true - others
        arrays[f"{name}_correct"] = result.correct
        arrays[f"{name}_prediction"] = ranks.gather_rows(prediction)
        arrays[f"{name}_margin"] = ranks.gather_rows(margin)
        for attack, mask in result.after.items():
            arrays[f"{name}_after_{attack}"] = mask
    if suite.corruptions is not None:
        arrays["corruptions_correct"] = suite.corruptions.correct
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def save_per_example(path: Path, arrays: Mapping[str, NDArray[Any]], keep: bool = False) -> None:
    """Write what :func:`per_example` found (.npz).

    Args:
        path: the file.
        arrays: by name.
        keep: leave in what the file holds of other attacks on the same images.
    """
    content: dict[str, Any] = dict(arrays)
    if keep:
        # A file that cannot be read has nothing to keep.
        unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*unreadable), np.load(path, allow_pickle=False) as before:
            content = {**before, **arrays}
    write_atomic(path, lambda file: np.savez(file, **content))


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
