"""All accuracies of one network, over all processes, and examples to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arat_fast.data.given import Given, images_and_labels
from arat_fast.device import describe_device, versions
from arat_fast.display import Display, SuiteProgress
from arat_fast.distributed import ALONE, Ranks
from arat_fast.evaluation.autoattack import FOR_ANY_CLASSES, MIN_CLASSES, autoattack, is_randomised
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    ThreatModel,
    clean_accuracy,
    evaluation_mode,
    pgd_accuracy,
    predict,
    share_evaluation,
)
from arat_fast.evaluation.pieces import Pieces, checksum
from arat_fast.files import write_atomic
from arat_fast.models.features import logits_of
from arat_fast.models.split_batch_norm import Branch, SplitBatchNorm2d
from arat_fast.settings import shown
from arat_fast.statistics import wilson_interval

LABELS = {
    "clean_branch": "clean (clean branch)",
    "autoattack": "AutoAttack",
    "apgd-ce": "APGD-CE alone",
    "square": "Square alone",
}
"""What results are called; PGD's say its steps."""

NUM_EXAMPLES = 16
NEARLY_ALL = 0.95
"""Share of the answers from which a model is said to give but one."""

RANDOMISED = (
    "two equal calls of the network give different answers: AutoAttack is its version rand, with "
    "the mean gradient of 20 draws; every answer that was counted is one draw"
)

ATTACKS = ("pgd", "autoattack", "apgd-ce", "square", "aa-torchattacks10")
"""What an evaluation can hold beside the clean accuracy. "apgd-ce" and "square" are AutoAttack's
first and last attack alone; "aa-torchattacks10" overstates robustness and is for comparison with
the paper's table only."""


@dataclass(frozen=True)
class SuiteResult:
    """Results by name ("clean", "clean_branch", "pgd20", "autoattack", …), in the order they ran.

    Attributes:
        results: of the clean images and of each attack.
        left_out: attacks that were asked for and cannot be run, and why.
        collapsed: what :func:`collapse` says of the clean images.
        randomised: that the network answers equal images differently, and what that changes.
        per_class: right answers by class, under the name of each result, and under "images" how
            many images there are of each.
        pieces: what is kept on disk until the caller has written the results and removes it.
    """

    results: dict[str, AttackResult]
    left_out: dict[str, str] = field(default_factory=dict)
    collapsed: str = ""
    randomised: str = ""
    per_class: dict[str, list[int]] = field(default_factory=dict)
    pieces: Pieces = field(default_factory=Pieces)

    def record(self) -> dict[str, dict[str, Any]]:
        """Accuracies, counts and how they were measured, as JSON types."""
        return {name: result.record() for name, result in self.results.items()}

    def __str__(self) -> str:
        return "\n".join(accuracy_lines(self.record()))

    def remarks(self) -> dict[str, Any]:
        """What else a record says: "left_out", "collapsed", "randomised" and "per_class", where
        there is something to say."""
        names = "left_out", "collapsed", "randomised", "per_class"
        return {name: value for name in names if (value := getattr(self, name))}

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
    return {name: reason for name in attacks if name not in {"pgd", *FOR_ANY_CLASSES}}


def accuracy_lines(accuracy: Mapping[str, dict[str, Any]]) -> list[str]:
    """Results as lines of text.

    Args:
        accuracy: as of :meth:`SuiteResult.record`.
    """
    lines = []
    for name, record in accuracy.items():
        label = LABELS.get(name, name.replace("pgd", "PGD-"))
        counts = f"{record['correct']}/{record['num_samples']}"
        low, high = (100 * end for end in record["interval"])
        ball = f"  {record['norm']} {shown(record['eps'])}" if "norm" in record else ""
        lines.append(
            f"{label:22} {100 * record['value']:6.2f} %   {counts:12}  "
            f"95 % interval {low:.2f} to {high:.2f} %{ball}"
        )
    return lines


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
    check: Callable[[], None] = lambda: None,
    found: Callable[[str, AttackResult], object] = lambda name, result: None,
    ranks: Ranks = ALONE,
) -> SuiteResult:
    """Clean accuracy of both branches, and accuracy of the ``adv`` branch under attacks.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device, this process's share of them.
        threat, num_steps, alpha, batch_size, seed, num_restarts: as for :func:`evaluate`.
        attacks: of :data:`ATTACKS`; those of :func:`attacks_left_out` are not run.
        folder: where finished pieces are kept; an interrupted evaluation of the same weights,
            images and settings goes on from them. They stay for the caller to remove, see
            :class:`SuiteResult`. None keeps nothing.
        progress: told what is running.
        check: called again and again on clean images and in PGD; what it raises ends the
            evaluation.
        found: told each result as soon as it is there, whatever becomes of the next.
        ranks: the processes that share the images; each returns the results of all, adversarial
            images of its own share only, and keeps pieces of its own.

    Raises:
        ValueError: an attack is unknown, or an argument is out of range.
    """
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}, expected some of {', '.join(ATTACKS)}")
    left_out = attacks_left_out(attacks, len(images.classes))
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
    clean = partial(clean_accuracy, model, batch_size=batch_size, check=check)
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
        check=check,
    )
    full = partial(
        autoattack,
        model,
        threat=threat,
        batch_size=batch_size,
        seed=seed,
        pieces=pieces,
        progress=progress,
    )
    randomised = ranks.largest(int(is_randomised(model, images))) > 0
    available: dict[str, Callable[[ImageSet], AttackResult]] = {
        "pgd": pgd,
        "autoattack": partial(full, version="rand") if randomised else full,
        "apgd-ce": partial(full, attacks=("apgd-ce",)),
        "square": partial(full, attacks=("square",)),
        "aa-torchattacks10": partial(full, version="torchattacks10"),
    }
    evaluations: dict[str, Callable[[ImageSet], AttackResult]] = {"clean": clean}
    if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        evaluations["clean_branch"] = partial(clean, branch="clean")
    for name, attack in available.items():
        if name in attacks and name not in left_out:
            evaluations[f"pgd{num_steps}" if name == "pgd" else name] = attack
    results = {}
    for name, each in evaluations.items():
        results[name] = share_evaluation(ranks, each, images)
        found(name, results[name])
    answers = results["clean"].answers
    labels = ranks.gather_rows(images.y)
    count = partial(torch.bincount, minlength=len(images.classes))
    # A process without images has no answers.
    given = ranks.sum_(count((images.y if answers is None else answers).cpu()))
    right = count(labels.cpu())
    per_class = {"images": right.tolist()}
    per_class |= {name: count(labels[r.correct]).tolist() for name, r in results.items()}
    num_correct = int(results["clean"].correct.sum())
    collapsed = collapse(given, right, num_correct, images.classes)
    remark = RANDOMISED if randomised else ""
    return SuiteResult(results, left_out, collapsed, remark, per_class, pieces)


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    data: Given,
    threat: ThreatModel,
    attacks: Sequence[str] = ("pgd", "autoattack"),
    *,
    num_steps: int = 20,
    alpha: float | None = None,
    num_restarts: int = 1,
    batch_size: int = 250,
    max_samples: int = 0,
    seed: int = 0,
    device: torch.device | str | None = None,
    display: Display | None = None,
) -> SuiteResult:
    """Accuracy on clean images and under attacks, in float32, of any network; of one with split
    BatchNorm on its ``adv`` branch, and as "clean_branch" on clean images through the other.

    Args:
        model: images (N, C, H, W) in [0, 1] → logits (N, classes): a module, which is put in eval
            mode meanwhile, or any differentiable function, which the caller has put there.
        data: a Dataset or DataLoader of (image, label), see :data:`arat_fast.data.given.Given`.
        threat: ball of the attacks.
        attacks: of :data:`ATTACKS`.
        num_steps, alpha, num_restarts: of PGD; alpha is a quarter of the radius by default.
        batch_size: samples at a time.
        max_samples: the first samples only; 0 for all.
        seed: of the attacks.
        device: where the images go; by default where the parameters of the module are.
        display: where progress is shown; None: on standard error where that is a terminal.

    Returns:
        results by name; printed, a line each; ``record()`` gives accuracies, counts and
        intervals as JSON types.

    Raises:
        ValueError: an attack is unknown, a label is no class, an image is outside [0, 1], the
            network takes no such images, or the module was switched to another branch.
    """
    network = model if isinstance(model, nn.Module) else _Called(model)
    if device is None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if any(isinstance(m, SplitBatchNorm2d) and m.branch != "adv" for m in network.modules()):
        raise ValueError(
            "evaluate chooses the branches itself, adv under attack, got a network inside of "
            'use_branch: pass export_plain(model, "clean") for the clean branch'
        )
    x, y = (tensor.to(device) for tensor in images_and_labels(data, max_samples))
    num_classes = logits_of(network, x[:1]).shape[1]
    if not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes - 1}], got {int(y.min())} to {int(y.max())}"
        )
    classes = tuple(str(number) for number in range(num_classes))
    if display is None:
        display = Display()
        display.console.quiet = not display.console.is_terminal
    with display.evaluating() as bar:
        return evaluate_all(
            network,
            ImageSet(x, y, classes),
            threat,
            num_steps=num_steps,
            alpha=threat.eps / 4 if alpha is None else alpha,
            attacks=attacks,
            batch_size=batch_size,
            seed=seed,
            num_restarts=num_restarts,
            progress=bar,
        )


class _Called(nn.Module):
    """A function as a network without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def collapse(answers: Tensor, labels: Tensor, correct: int, classes: Sequence[str]) -> str:
    """Whether a network has learned nothing, in words; empty where it has, or where the images are
    all of one class.

    Args:
        answers, labels: (classes,), how often each was the answer, and how often it was right.
        correct: right answers.
        classes: names.
    """
    total = int(labels.sum())
    majority = int(labels.max())
    if majority == total:
        return ""
    most = int(answers.max())
    if most >= NEARLY_ALL * total and majority < NEARLY_ALL * total:
        one = classes[int(answers.argmax())]
        return f"{100 * most / total:.0f} % of the answers are {one}: the model has collapsed"
    low, _ = wilson_interval(correct, total)
    if low <= 1 / len(classes):
        return (
            f"clean accuracy cannot be told from chance, {100 / len(classes):.3g} % with "
            f"{len(classes)} classes"
        )
    if low <= majority / total:
        return (
            "clean accuracy cannot be told from that of always answering "
            f"{classes[int(labels.argmax())]}, {100 * majority / total:.3g} %"
        )
    return ""


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
    of several.

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
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def save_examples(path: Path, model: nn.Module, images: ImageSet, x_adv: Tensor) -> None:
    """Write the first 16 images of the set, their adversarial versions ``x_adv`` in the same order
    and the predictions (.npz)."""
    x, x_adv, y = (tensor[:NUM_EXAMPLES] for tensor in (images.x, x_adv, images.y))
    arrays: dict[str, Any] = {"x": x, "x_adv": x_adv, "y": y}
    with evaluation_mode(model):
        for name, inputs in (("clean", x), ("adv", x_adv)):
            best = predict(model, inputs, len(inputs)).softmax(dim=1).max(dim=1)
            arrays |= {f"pred_{name}": best.indices, f"prob_{name}": best.values}
    arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
    write_atomic(path, lambda f: np.savez(f, **arrays, classes=np.array(images.classes)))
