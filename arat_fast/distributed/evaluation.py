"""Evaluations whose images are shared by all processes: each counted once, none twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arat_fast.data import Batches
from arat_fast.distributed.ranks import Ranks
from arat_fast.evaluation.evaluate import AttackResult, ImageSet
from arat_fast.training.interrupt import EvaluationStopped


def gather_images(ranks: Ranks, batches: Batches, max_samples: int = 0) -> ImageSet:
    """All images of a split, or the first ``max_samples`` (0: all), on every process.

    Args:
        ranks: the processes; each loads its share.
        batches: of the split.
        max_samples: >= 0.
    """
    if ranks.alone:
        return ImageSet.from_batches(batches, max_samples)
    plan = batches.plan
    limit = max_samples or plan.samples_before(len(plan))
    xs, ys, places = [], [], []
    for number, (x, y) in enumerate(batches.epoch(0)):
        xs.append(x)
        ys.append(y)
        own = plan.places(number)
        places.append(torch.arange(own.start, own.stop, device=x.device))
        if plan.samples_before(number + 1) >= limit:
            break
    order = ranks.gather_rows(torch.cat(places)).argsort()[:limit]
    x, y = ranks.gather_rows(torch.cat(xs)), ranks.gather_rows(torch.cat(ys))
    return ImageSet(x[order], y[order], batches.classes)


def share_evaluation(
    ranks: Ranks, evaluate: Callable[[ImageSet], AttackResult], images: ImageSet
) -> AttackResult:
    """The result of ``evaluate`` on all images, of which each process does its share.

    Counts are exact. Random starts depend on the number of processes.

    Args:
        ranks: the processes.
        evaluate: attacks some of the images.
        images: all of them, at least one, the same on every process.

    Raises:
        EvaluationStopped: a process was told to stop; raised on all of them.
    """
    if ranks.alone:
        return evaluate(images)
    part = ranks.shard.share(len(images.y))
    own = ImageSet(images.x[part], images.y[part], images.classes)
    stopped = False
    result = AttackResult(own.y == own.y, own.x, {})
    if len(own.y):
        try:
            result = evaluate(own)
        except EvaluationStopped:
            stopped = True
    ranks.meet()
    if not ranks.all(not stopped):
        raise EvaluationStopped
    correct, x_adv = ranks.gather_rows(result.correct), ranks.gather_rows(result.x_adv)
    masks = list(result.after.values())
    # A process without images has no attacks to tell of.
    masks += [own.y == own.y] * (ranks.largest(len(masks)) - len(masks))
    joined = [ranks.gather_rows(mask) for mask in masks]
    after = dict(zip(result.after, joined, strict=False))
    return AttackResult(correct, x_adv, _join_details(ranks, result), after)


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
