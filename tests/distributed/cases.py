"""What one process computes alone and several together: steps in float64, evaluations, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arat_fast.attacks import PGD, RandomStart
from arat_fast.config import AverageConfig
from arat_fast.data import BatchPlan, ResidentBatches, Shift
from arat_fast.distributed import ALONE, Ranks, join
from arat_fast.distributed.batch_norm import synchronize_batch_norm
from arat_fast.evaluation import ImageSet, ThreatModel, autoattack, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.evaluate import share_evaluation
from arat_fast.evaluation.record import save_per_example
from arat_fast.evaluation.suite import SuiteResult, per_example
from arat_fast.models import convert_split_batch_norm
from arat_fast.objectives import ARAT, MART, TRADES, NaturalTraining, Objective
from arat_fast.run.state import Progress, Run
from arat_fast.training.averaging import WeightAverage, refresh_batch_norm
from arat_fast.training.checkpoint import CheckpointFolder
from arat_fast.training.metrics import NotFiniteError, StepMetrics
from arat_fast.training.step import TrainStep
from arat_fast.training.values import Values

NUM_STEPS = 5
BATCH = 13
NUM_CLASSES = 4


@dataclass(frozen=True)
class Case:
    objective: str = "arat"
    sync: bool = True
    norm: str = "batch"
    bn: str = "batch"
    ball: str = "Linf"
    restarts: int = 1
    accumulate: int = 1
    overlap: bool = True
    noisy_clean: bool = False
    image: tuple[int, int, int] = (3, 6, 6)


CASES = {
    "arat": Case(),
    "after the backward": Case(overlap=False),
    "trades": Case("trades", bn="running"),
    "mart": Case("mart"),
    "L2, two starts": Case(ball="L2", restarts=2),
    # 25 pixels: the random numbers of a part begin within a group of four.
    "odd images": Case(image=(1, 5, 5)),
    "official start": Case(bn="batch_update", noisy_clean=True),
    "own statistics": Case(sync=False),
    "own statistics, attack on running ones": Case(sync=False, bn="running"),
    # Without BatchNorm nothing depends on which samples are together.
    "accumulate": Case(norm="none", accumulate=3, restarts=2),
    "accumulate trades": Case("trades", norm="none", accumulate=2),
    "accumulate mart, official start": Case("mart", norm="none", accumulate=2, noisy_clean=True),
}


def network(case: Case) -> nn.Module:
    """Two convolutions with BatchNorm, split for ARAT."""
    channels, height, width = case.image
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norms = [nn.BatchNorm2d(n) if case.norm == "batch" else nn.GroupNorm(2, n) for n in (8, 16)]
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            norms[0],
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            norms[1],
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, NUM_CLASSES),
        )
    if case.objective == "arat":
        model = convert_split_batch_norm(model)
    return model.double()


def objective_of(case: Case, model: nn.Module) -> Objective:
    if case.objective == "trades":
        return TRADES()
    if case.objective == "mart":
        return MART()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # The predictor's BatchNorm would see the parts of a batch.
        objective = ARAT(model, ["1", "4"], case.image, predictor=case.norm == "batch")
    objective.start_epoch(0.4)
    return objective.double()


def data_of(case: Case, ranks: Ranks) -> ResidentBatches:
    generator = torch.Generator().manual_seed(2)
    shape = (3 * BATCH - 2, *case.image)
    return ResidentBatches(
        torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        torch.randint(NUM_CLASSES, (shape[0],), generator=generator),
        tuple("abcd"),
        BatchPlan(shape[0], BATCH, shuffle=True, shard=ranks.shard),
        Shift(1, flip=True),
    )


def train(case: Case, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The state after five steps, the last batch of an epoch, smaller by two, included."""
    model = network(case)
    objective = objective_of(case, model)
    if case.sync and ranks.group is not None:
        synchronize_batch_norm(model, ranks.group)
        synchronize_batch_norm(objective, ranks.group)
    step = TrainStep(
        model,
        objective,
        PGD(0.1, 0.05, 2, case.ball, num_restarts=case.restarts, bn=case.bn),  # type: ignore[arg-type]
        torch.optim.SGD(
            [*model.parameters(), *objective.parameters()], 0.1, momentum=0.9, weight_decay=5e-4
        ),
        fold=False,
        noisy_clean=case.noisy_clean,
        generator=torch.Generator().manual_seed(3),
        accumulate=case.accumulate,
        ranks=ranks,
        overlap=case.overlap,
    )
    average = WeightAverage(AverageConfig("swa", every=2), model, 0)
    data = data_of(case, ranks)
    done, epoch = 0, 0
    losses: list[Tensor] = []
    while done < NUM_STEPS:
        for number, (x, y) in enumerate(data.epoch(epoch)):
            if done == NUM_STEPS:
                break
            place = data.plan.place(number)
            share = len(x) / place.total
            losses.append(ranks.sum_(step(x.double(), y, place=place)["loss"] * share))
            average.update(done)
            done += 1
        epoch += 1
    assert average.model is not None
    if case.norm == "batch":
        refresh_batch_norm(
            average.model,
            ((x.double(), y) for x, y in data.epoch(9)),  # type: ignore[misc]
            objective,
            PGD(0.1, 0.05, 2),
            torch.Generator().manual_seed(4),
            ranks=ranks,
            plan=data.plan,
        )
    return {
        **{f"model.{k}": v for k, v in model.state_dict().items()},
        **{f"objective.{k}": v for k, v in objective.state_dict().items()},
        **{f"average.{k}": v for k, v in average.model.state_dict().items()},
        "losses": torch.stack(losses),
        "next key": step.attack.draw_keys(step.generator, torch.device("cpu")),
    }


def shard_by_shard(case: Case, num_ranks: int) -> dict[str, Tensor]:
    """What unsynchronised BatchNorm means, in one process: each rank's part by itself.

    For every part the gradients and the moved statistics, both added with the part's share.
    """
    model = network(case)
    objective = objective_of(case, model)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4)
    attack = PGD(0.1, 0.05, 2, bn=case.bn)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    buffers = [
        (buffer, name)
        for module in (model, objective)
        for name, buffer in module.named_buffers()
        if "running" in name
    ]
    shards = [data_of(case, Ranks(rank, num_ranks)) for rank in range(num_ranks)]
    done, epoch = 0, 0
    while done < NUM_STEPS:
        epochs = [list(data.epoch(epoch)) for data in shards]
        for number in range(len(shards[0])):
            if done == NUM_STEPS:
                break
            key = attack.draw_keys(generator, torch.device("cpu"))
            before = [buffer.clone() for buffer, _ in buffers]
            gradients = [torch.zeros_like(p) for p in parameters]
            statistics = [torch.zeros_like(buffer) for buffer, _ in buffers]
            for rank in range(num_ranks):
                for (buffer, _), old in zip(buffers, before, strict=True):
                    buffer.copy_(old)
                model.train()
                x, y = epochs[rank][number]
                place = shards[rank].plan.place(number)
                # As the step lays them: the numbers of a start belong to positions in memory.
                x = x.double().contiguous(memory_format=torch.channels_last)
                start = RandomStart(keys=key, first=place.first)
                x_adv = attack(model, x, y, start)
                loss = objective(model, x, x_adv, y, start).loss * (len(x) / place.total)
                for total, g in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                    total += g
                for total, (buffer, _) in zip(statistics, buffers, strict=True):
                    total += buffer * (len(x) / place.total)
            for (buffer, _), total in zip(buffers, statistics, strict=True):
                buffer.copy_(total)
            for parameter, total in zip(parameters, gradients, strict=True):
                parameter.grad = total
            optimizer.step()
            done += 1
        epoch += 1
    return {
        **{f"model.{k}": v for k, v in model.state_dict().items()},
        **{f"objective.{k}": v for k, v in objective.state_dict().items()},
    }


def evaluations(ranks: Ranks, folder: Path) -> dict[str, object]:
    """The network of a case on 23 images, of which 20 are asked for; image by image into
    ``folder``."""
    case = CASES["arat"]
    model = network(case).float()
    generator = torch.Generator().manual_seed(7)
    batches = ResidentBatches(
        torch.randint(256, (23, *case.image), generator=generator, dtype=torch.uint8),
        torch.randint(NUM_CLASSES, (23,), generator=generator),
        tuple("abcd"),
        BatchPlan(23, 7),
    )
    images = ImageSet.from_batches(batches, 20, ranks.shard)
    threat = ThreatModel(0.02, "Linf")
    clean = partial(clean_accuracy, model, batch_size=4)
    pgd = partial(pgd_accuracy, model, threat=threat, num_steps=2, alpha=0.01, batch_size=4)
    full = partial(autoattack, model, threat=threat, batch_size=8, version="torchattacks10")
    evaluate = {"clean": clean, "pgd": pgd, "autoattack": full}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module(autoattack.__module__), "NUM_QUERIES", 100)
        results = {name: share_evaluation(ranks, call, images) for name, call in evaluate.items()}
    # Fewer images than processes.
    one = ImageSet.from_batches(batches, 1, ranks.shard)
    few = {"clean": share_evaluation(ranks, clean, one)}
    for name, part, found in (("all", images, results), ("few", one, few)):
        arrays = per_example(model, part, SuiteResult(found), 4, ranks)
        if ranks.is_main:
            save_per_example(folder / f"{name}.npz", arrays)
    return {
        "x": images.x,
        "y": images.y,
        "few": few["clean"].correct,
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
    raise AssertionError("nothing was noticed")


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
    raise AssertionError("nothing was noticed")


def as_rank(folder: Path) -> None:
    """One rank of a job: runs every case and leaves its results in ``folder/RANK.pt``."""
    with join("cpu") as ranks:
        content = b"abc" if ranks.is_main else None
        results: dict[str, object] = {
            "broadcast": list(ranks.broadcast_bytes(content)),
            "rows": ranks.gather_rows(torch.full((ranks.rank, 2), float(ranks.rank))),
            "largest": ranks.largest(ranks.rank),
            "evaluations": evaluations(ranks, folder),
            "metrics": metrics(ranks),
            "own disks": own_disks(ranks, folder),
            **{name: train(case, ranks) for name, case in CASES.items()},
        }
        torch.save(results, folder / f"{ranks.rank}.pt")
