"""Evaluations whose images are shared by all processes: each counted once, none twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arat_fast.distributed.ranks import Ranks
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
    masks = list(result.after.values())
    # A process without images has no attacks to tell of.
    masks += [images.y == images.y] * (ranks.largest(len(masks)) - len(masks))
    joined = [ranks.gather_rows(mask) for mask in masks]
    after = dict(zip(result.after, joined, strict=False))
    correct = ranks.gather_rows(result.correct)
    return AttackResult(correct, result.x_adv, _join_details(ranks, result), after)


def _join_details(ranks: Ranks, result: AttackResult) -> dict[str, Any]:
    """Rank 0's details, which always has images, with counts and accuracies over all images."""
    details = dict(result.details)
    num = len(result.correct)
    attacks = list(details.get("attacks", {}).values())
    counts = [round(value * num) for value in attacks]
    counts += [details.get("num_rejected", 0), details.get("num_disputed", 0), num]
    # A process without images has no attacks to tell of.
    longest = ranks.largest(len(counts))
    padded = torch.tensor([0] * (longest - len(counts)) + counts)
    totals = ranks.gather(padded).sum(dim=0).tolist()
    if "num_rejected" in details:
        details["num_rejected"] = totals[-3]
    if "num_disputed" in details:
        details["num_disputed"] = totals[-2]
    if "attacks" in details:
        shares = [count / totals[-1] for count in totals[:-3]]
        details["attacks"] = dict(zip(details["attacks"], shares, strict=True))
    return details
