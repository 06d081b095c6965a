"""Accuracy on clean images and under PGD, by one process or by several, on the stated ball."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from arat_fast.attacks.norms import NORMS, Norm
from arat_fast.attacks.pgd import PGD, RandomStart, check_images, perturbation_norm
from arat_fast.data.batches import Batches
from arat_fast.data.fingerprint import class_order
from arat_fast.data.plan import WHOLE, Shard
from arat_fast.device import full_float32
from arat_fast.distributed import Ranks
from arat_fast.evaluation.pieces import Pieces
from arat_fast.models.split_batch_norm import Branch, use_branch, use_statistics
from arat_fast.saved.weights import check_finite
from arat_fast.settings import NormName
from arat_fast.statistics import wilson_interval
from arat_fast.stop import EvaluationStopped
from arat_fast.training.metrics import NotFiniteError

Progress = Callable[[str, int, int], None]
"""Called with what is running, the samples done and the samples in all."""


LARGE_BATCH = 2**16
"""Numbers in a batch of images whose pass can take long on a CPU; in a smaller one a call after
every layer would cost more than a hundredth."""

ROUNDING = 1e-6
"""Allowance for float32 rounding: relative to eps, plus as much absolutely."""


@dataclass(frozen=True)
class ThreatModel:
    """Perturbations of norm at most ``eps`` that keep the image in [0, 1].

    Attributes:
        eps: radius in units of the image range, >= 0; in Linf at most 1.
        norm: "Linf", "L2" or "L1".
    """

    eps: float
    norm: NormName = "Linf"

    def __post_init__(self) -> None:
        self.ball.check("eps", self.eps)

    @property
    def ball(self) -> Norm:
        """The norm itself."""
        return NORMS[self.norm]

    def allows(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Whether each of ``x_adv`` (N, C, H, W) is one of ``x``, (N,) bool; NaN never is."""
        near = perturbation_norm(x, x_adv, self.norm) <= self.eps * (1 + ROUNDING) + ROUNDING
        flat = x_adv.flatten(1)
        return near & (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)


@dataclass(frozen=True)
class ImageSet:
    """Images x (N, C, H, W), float32 in [0, 1], labels y (N,), int64, and the class names."""

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    @classmethod
    def from_batches(cls, batches: Batches, max_samples: int = 0, shard: Shard = WHOLE) -> ImageSet:
        """All images of a split, or the first ``max_samples`` (0: all), or a process's part of
        these, for which no other batch is read.

        Args:
            batches: of the split, whole on every process, not shuffled.
            max_samples: >= 0.
            shard: this process; its images lie in a row.
        """
        total = min(max_samples or batches.num_samples, batches.num_samples)
        part = shard.share(total)
        plan = batches.plan
        # A process without images reads one batch, for their shape.
        first = min(part.start // plan.batch_size, len(plan) - 1)
        start = plan.samples_before(first)
        xs, ys = [], []
        for number, (x, y) in enumerate(batches.epoch(0, first), first):
            xs.append(x)
            ys.append(y)
            if plan.samples_before(number + 1) >= part.stop:
                break
        own = slice(part.start - start, part.stop - start)
        return cls(torch.cat(xs)[own], torch.cat(ys)[own], batches.classes)

    def split(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels, so many at a time."""
        return zip(torch.split(self.x, batch_size), torch.split(self.y, batch_size), strict=True)

    def in_order(self, classes: Sequence[str], source: object) -> ImageSet:
        """With labels that count the classes as a network does, whose ``classes`` are in the order
        of its logits, or empty where it has no names.

        Raises:
            ValueError: they are other classes than those of the network, from ``source``.
        """
        order = class_order(classes, self.classes, source)
        if order is None:
            return self
        return ImageSet(self.x, torch.tensor(order, device=self.y.device)[self.y], tuple(classes))


@dataclass(frozen=True)
class AttackResult:
    """What one evaluation found, example by example.

    Attributes:
        correct: (N,) bool: classified correctly, and by every example the attack tried.
        x_adv: (N, C, H, W): where ``correct`` is False, an image in the ball that is misclassified,
            which can be the clean one; elsewhere an image that is not: PGD's own attempt, or the
            clean image where AutoAttack failed or there was no attack. Of several
            processes, those of this one.
        details: how it was done, as JSON types.
        after: ``correct`` as it was after each of several attacks.
        answers: (n,) int64: the classes answered, of clean images, of this process's own.
    """

    correct: Tensor
    x_adv: Tensor
    details: dict[str, Any]
    after: dict[str, Tensor] = field(default_factory=dict)
    answers: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Share of correct examples, in [0, 1]."""
        return float(self.correct.double().mean())

    def record(self) -> dict[str, Any]:
        """Value, counts, Wilson's 95 % interval and details, as JSON types."""
        correct, num_samples = int(self.correct.sum()), len(self.correct)
        return {
            "value": self.accuracy,
            "correct": correct,
            "num_samples": num_samples,
            "interval": list(wilson_interval(correct, num_samples)),
            **self.details,
        }


@contextmanager
def evaluation_mode(model: nn.Module, branch: Branch = "adv") -> Iterator[None]:
    """Eval mode, one branch, running statistics, float32 without TF32; restored afterwards.

    Parameters need no gradient inside: an attack that runs a whole backward pass, as FAB does,
    neither pays for their gradients nor leaves any in ``.grad``.

    Raises:
        NotFiniteError: a weight or a statistic is NaN or infinite, or inside, as soon as it is, an
            answer of the network or a gradient of its images: neither says anything.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    check_finite(state, f"the weights of {type(model).__name__}")
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with (
            use_branch(model, branch),
            use_statistics(model, "running"),
            full_float32(),
            finite_answers(model),
        ):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def interruptible(model: nn.Module, x: Tensor, check: Callable[[], None]) -> Iterator[None]:
    """Call ``check`` after every pass of a network over batches like ``x``, on a CPU after every
    layer where that is large: a pass takes minutes there, its backward half without a line of
    Python, in which alone a signal is heard of.
    """

    def after(module: nn.Module, arguments: object, output: object) -> None:
        check()
        if every_layer and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: check())  # type: ignore[no-untyped-call]  # in torch

    every_layer = x.device.type == "cpu" and x.numel() >= LARGE_BATCH
    with ExitStack() as stack:
        for module in model.modules() if every_layer else [model]:
            stack.enter_context(module.register_forward_hook(after))
        yield


def finite_answers(model: nn.Module) -> RemovableHandle:
    """A context in which a NotFiniteError is raised as soon as the network's answer or the gradient
    of an image is NaN or infinite; it counts the images, and names the layer that was first."""
    return model.register_forward_hook(_check_answer)


def _check_answer(model: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
    (x,) = inputs
    if x.requires_grad:
        x.register_hook(_check_gradient)  # type: ignore[no-untyped-call]  # Tensor's own
    if logits.isfinite().all():
        return
    first: list[str] = []

    def watch(name: str, module: nn.Module, _: object, y: object) -> None:
        if not first and isinstance(y, Tensor) and not y.isfinite().all():
            first.append(f", first after {name}, a {type(module).__name__}")

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if module is not model:
                stack.enter_context(module.register_forward_hook(partial(watch, name)))
        # Not through the hook that this is.
        model.forward(x)
    raise NotFiniteError(
        f"the logits of {_num_bad(logits)} of {len(x)} images are NaN or infinite"
        f"{''.join(first)}: such an answer is no prediction, and nothing is evaluated; take "
        "weights from before they broke, or compute in float32"
    )


def _check_gradient(grad: Tensor) -> None:
    if not grad.isfinite().all():
        raise NotFiniteError(
            f"the gradients of {_num_bad(grad)} of {len(grad)} images are NaN or infinite: an "
            "attack that follows them says nothing of robustness, and nothing is evaluated"
        )


def _num_bad(rows: Tensor) -> int:
    return int((~rows.isfinite()).flatten(1).any(dim=1).sum())


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Logits (N, classes) of images (N, C, H, W), ``batch_size`` at a time."""
    return torch.cat([model(chunk) for chunk in torch.split(x, batch_size)])


def clean_accuracy(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int,
    branch: Branch = "adv",
    check: Callable[[], None] = lambda: None,
) -> AttackResult:
    """Accuracy on the images themselves.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        batch_size: samples at a time, >= 1.
        branch: BatchNorm branch; "adv" is the model that is deployed.
        check: called again and again; what it raises ends the evaluation.
    """
    check_images(images.x)
    with evaluation_mode(model, branch), interruptible(model, images.x[:batch_size], check):
        answers = predict(model, images.x, batch_size).argmax(dim=1)
    details = {"branch": branch, "precision": "float32", "batch_size": batch_size}
    return AttackResult(answers == images.y, images.x, details, answers=answers)


def pgd_accuracy(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int,
    alpha: float,
    batch_size: int,
    num_restarts: int = 1,
    seed: int = 0,
    pieces: Pieces | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> AttackResult:
    """Accuracy of the ``adv`` branch under PGD on the cross-entropy.

    An image counts as broken if it is misclassified by itself or if an adversarial example inside
    the ball is, from whichever restart; examples outside the ball or the range are counted in
    ``details`` and ignored.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attack.
        num_steps: gradient steps, >= 0.
        alpha: step size, >= 0.
        batch_size: samples at a time, >= 1.
        num_restarts: independent runs, >= 1.
        seed: of the random starts.
        pieces: what is finished already; each batch is one piece.
        progress: told after each batch.
        check: called again and again; what it raises ends the evaluation.

    Raises:
        ValueError: an argument out of range, or images outside [0, 1].
    """
    check_images(images.x)
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be >= 1, got {num_restarts}")
    attack = PGD(threat.eps, alpha, num_steps, threat.norm, bn="running")
    generator = torch.Generator(images.x.device).manual_seed(seed)
    pieces = pieces or Pieces()
    correct, x_adv, rejected, done = [], [], 0, 0

    def piece(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        robust, kept, rejected = torch.ones_like(y, dtype=torch.bool), x, 0
        # The strongest example by its loss need not be the one that is misclassified.
        for number in range(num_restarts):
            candidate = attack(model, x, y, RandomStart(generator))
            still, adversarial, outside = accept(model, x, y, candidate, threat)
            newly_broken = (robust & ~still).view(-1, 1, 1, 1)
            kept = torch.where(newly_broken, adversarial, kept) if number else adversarial
            robust &= still
            rejected += outside
        clean = predict(model, x, batch_size).argmax(dim=1) == y
        return {
            "correct": robust & clean,
            "x_adv": torch.where((robust & ~clean).view(-1, 1, 1, 1), x, kept),
            "rejected": torch.tensor(rejected),
            "generator": generator.get_state(),
        }

    with evaluation_mode(model), interruptible(model, images.x[:batch_size], check):
        for number, (x, y) in enumerate(images.split(batch_size)):
            found = pieces.get(f"pgd-{number}", partial(piece, x, y), x.device)
            # The next batch draws what it would draw after this one.
            generator.set_state(found["generator"].cpu())
            correct.append(found["correct"])
            x_adv.append(found["x_adv"])
            rejected += int(found["rejected"])
            done += len(x)
            if progress is not None:
                progress(f"PGD-{num_steps}", done, len(images.x))
    details = {
        "implementation": "arat_fast.attacks.PGD",
        "norm": threat.norm,
        "eps": threat.eps,
        "alpha": alpha,
        "num_steps": num_steps,
        "num_restarts": num_restarts,
        "precision": "float32",
        "batch_size": batch_size,
        "seed": seed,
        "num_rejected": rejected,
    }
    return AttackResult(torch.cat(correct), torch.cat(x_adv), details)


@torch.no_grad()
def accept(
    model: nn.Module, x: Tensor, y: Tensor, candidate: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor, int]:
    """Re-check what an attack returned.

    Returns:
        still correct (N,) bool; the adversarial images, with ``x`` where the candidate was outside
        the threat model; the number of those.
    """
    inside = threat.allows(x, candidate)
    adversarial = torch.where(inside.view(-1, 1, 1, 1), candidate, x)
    still = model(adversarial).argmax(dim=1) == y
    return still, adversarial, int((~inside).sum())


def share_evaluation(
    ranks: Ranks, evaluate: Callable[[ImageSet], AttackResult], images: ImageSet
) -> AttackResult:
    """The result of ``evaluate`` on all images, of which each process does its share.

    Counts are exact. Random starts depend on the number of processes.

    Args:
        ranks: the processes.
        evaluate: attacks some of the images.
        images: those of this process, as :meth:`ImageSet.from_batches` shares them; rank 0 has one
            at least.

    Returns:
        Results of all images, in the order of the ranks; ``x_adv`` of this process's own, since all
        of them may not fit into the memory of one.

    Raises:
        EvaluationStopped: a process was told to stop; raised on all of them.
    """
    if ranks.alone:
        return evaluate(images)
    stopped = 0
    result = AttackResult(images.y == images.y, images.x, {})
    if len(images.y):
        try:
            result = evaluate(images)
        except EvaluationStopped:
            stopped = 1
    ranks.meet()
    if ranks.largest(stopped):
        raise EvaluationStopped
    # A process without images has no attacks to tell of; rank 0 has, in their order.
    num_attacks = ranks.largest(len(result.after))
    masks = [*result.after.values()] or [result.correct] * num_attacks
    joined = [ranks.gather_rows(mask) for mask in masks]
    after = dict(zip(result.after, joined, strict=False))
    correct = ranks.gather_rows(result.correct)
    details = dict(result.details)
    for name in ("num_rejected", "num_disputed"):
        total = int(ranks.sum_(torch.tensor(details.get(name, 0))))
        if name in details:
            details[name] = total
    if "attacks" in details:
        details["attacks"] = {name: float(mask.double().mean()) for name, mask in after.items()}
    return AttackResult(correct, result.x_adv, details, after, result.answers)
