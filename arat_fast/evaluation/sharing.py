"""Evaluations whose images are shared by all processes: each counted once, none twice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arat_fast.distributed import Ranks
from arat_fast.evaluation.evaluate import AttackResult, ImageSet
from arat_fast.stop import EvaluationStopped


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
    stopped = False
    result = AttackResult(images.y == images.y, images.x, {})
    if len(images.y):
        try:
            result = evaluate(images)
        except EvaluationStopped:
            stopped = True
    ranks.meet()
    if not ranks.all(not stopped):
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
    return AttackResult(correct, result.x_adv, details, after)
