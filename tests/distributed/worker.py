"""One process of a job of the tests: runs every case and writes this rank's results."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from distributed import cases

from arat_fast.data import BatchPlan, ResidentBatches
from arat_fast.distributed import Ranks, join
from arat_fast.evaluation import ThreatModel
from arat_fast.evaluation.autoattack import autoattack
from arat_fast.evaluation.evaluate import ImageSet, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.record import save_per_example
from arat_fast.evaluation.sharing import share_evaluation
from arat_fast.evaluation.suite import SuiteResult, per_example
from arat_fast.objectives import NaturalTraining
from arat_fast.run.state import Progress, Run
from arat_fast.training.checkpoint import CheckpointFolder
from arat_fast.training.metrics import NotFiniteError, StepMetrics
from arat_fast.training.values import Values


def evaluations(ranks: Ranks, folder: Path) -> dict[str, object]:
    """The network of a case on 23 images, of which 20 are asked for; image by image into
    ``folder``."""
    case = cases.CASES["arat"]
    model = cases.network(case).float()
    generator = torch.Generator().manual_seed(7)
    batches = ResidentBatches(
        torch.randint(256, (23, *case.image), generator=generator, dtype=torch.uint8),
        torch.randint(cases.NUM_CLASSES, (23,), generator=generator),
        tuple("abcd"),
        BatchPlan(23, 7),
    )
    images = ImageSet.from_batches(batches, 20, ranks.shard)
    threat = ThreatModel(0.02, "Linf")
    results = {
        "clean": share_evaluation(
            ranks, lambda own: clean_accuracy(model, own, batch_size=4), images
        ),
        "pgd": share_evaluation(
            ranks,
            lambda own: pgd_accuracy(model, own, threat, num_steps=2, alpha=0.01, batch_size=4),
            images,
        ),
        "autoattack": share_evaluation(
            ranks,
            lambda own: autoattack(model, own, threat, batch_size=8, version="torchattacks10"),
            images,
        ),
    }
    suite = SuiteResult(results)
    arrays = per_example(model, images, suite, 4, ranks)
    if ranks.is_main:
        save_per_example(folder / "all.npz", arrays)
    # Fewer images than processes.
    one = ImageSet.from_batches(batches, 1, ranks.shard)
    few = share_evaluation(ranks, lambda own: clean_accuracy(model, own, batch_size=4), one)
    suite = SuiteResult({"clean": few})
    arrays = per_example(model, one, suite, 4, ranks)
    if ranks.is_main:
        save_per_example(folder / "few.npz", arrays)
    return {
        "x": images.x,
        "y": images.y,
        "few": few.correct,
        **{name: result.record() for name, result in results.items()},
        **{f"{name} correct": result.correct for name, result in results.items()},
        **{f"{name} x_adv": result.x_adv for name, result in results.items()},
    }


def metrics(ranks: Ranks) -> dict[str, object]:
    """Means over unequal parts, and a loss that is not finite on the last rank alone."""
    found = StepMetrics(ranks)
    total = 5 * ranks.world_size - 1
    for step in range(3):
        value = torch.tensor(float(10 * step + ranks.rank))
        found.add(step, Values.pack({"loss": value, "accuracy_clean": value / 100}), total)
    means = found.read()
    last = ranks.rank == ranks.world_size - 1
    for step in (3, 4):
        value = torch.tensor(float("nan") if last and step == 4 else 1.0)
        found.add(step, Values.pack({"loss": value, "accuracy_clean": value}), total)
    try:
        found.read()
    except NotFiniteError as error:
        return {"means": means, "total": total, "error": str(error)}
    return {"means": means, "total": total, "error": ""}


def own_disks(ranks: Ranks, folder: Path) -> dict[str, object]:
    """What each rank says of the last checkpoint, where only rank 0 sees it, and of weights that
    are not finite on the last rank alone."""
    run = Run.__new__(Run)
    run.ranks = ranks
    run.progress = Progress(8, 10)
    run.checkpoints = CheckpointFolder(folder / f"disk{ranks.rank}", 2)
    run.model, run.objective = torch.nn.Linear(2, 2), NaturalTraining()
    if ranks.rank == ranks.world_size - 1:
        run.model.bias.data.fill_(float("nan"))
    before = run.last_checkpoint()
    if ranks.is_main:
        run.checkpoints.folder.mkdir()
        run.checkpoints.save(4, {"step": 4}, lambda: None)
    try:
        run.save()
    except NotFiniteError as error:
        return {"before": before, "error": str(error)}
    return {"before": before, "error": ""}


def as_rank(folder: str, environment: dict[str, str], log: str) -> None:
    """Body of a forked process: one rank, its results in ``folder/RANK.pt``."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    with join("cpu") as ranks:
        content = b"abc" if ranks.is_main else None
        results: dict[str, object] = {
            "broadcast": list(ranks.broadcast_bytes(content)),
            "rows": ranks.gather_rows(torch.full((ranks.rank, 2), float(ranks.rank))),
            "all": [ranks.all(True), ranks.all(ranks.rank == 0)],
            "evaluations": evaluations(ranks, Path(folder)),
            "metrics": metrics(ranks),
            "own disks": own_disks(ranks, Path(folder)),
        }
        for name, case in cases.CASES.items():
            results[name] = cases.train(case, ranks)
        torch.save(results, Path(folder, f"{ranks.rank}.pt"))
