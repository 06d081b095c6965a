"""What checkpoints and the distributed path cost, on digits: shares of the time of training.

    python benchmarks/distributed_overhead.py

The contestants train the same epochs of the recipe and take turns: plain; with a checkpoint after
every epoch, the wait for the last one included; as the only process of a job (gloo on a CPU, NCCL
on a GPU), its collectives and its signs of life included; and both. The first two run in a process
that belongs to no job, the others in one that does; one of the two waits while the other trains.
Each is compared with the plain one of the same round, in wall time and in processor time of all
threads. Two trainings of the same kind differ by more than the target on a machine that does other
things too. So the added work is also counted where it is done: the wall time that the training
spends in it, and the processor time of the writer of checkpoints beside it, as a share of the rest
of that training. What it does to caches is not in it; that shows in the comparison only.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from arat_fast.bench.machine import describe_machine, new_record
from arat_fast.config import Config
from arat_fast.display import Display
from arat_fast.distributed import ALONE, Ranks, join
from arat_fast.files import write_json
from arat_fast.recipes import recipe
from arat_fast.run.loop import Trainer
from arat_fast.stop import StopRequest
from arat_fast.training import checkpoint

TARGET = 0.03


def configuration(epochs: int, device: str) -> Config:
    """The recipe without evaluations during training."""
    config = recipe("digits")
    train = dataclasses.replace(config.train, epochs=epochs, eval_every=0, device=device)
    return dataclasses.replace(config, train=train)


class Spent:
    """Adds up the time that calls take.

    Attributes:
        seconds: so far, in all threads.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def timed(self, call: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        """``call``, whose time is added."""

        def timed(*args: Any, **keywords: Any) -> Any:
            start = clock()
            try:
                return call(*args, **keywords)
            finally:
                with self._lock:
                    self.seconds += clock() - start

        return timed

    def watch(
        self, owner: Any, *names: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Time the methods of ``owner`` of these names."""
        for name in names:
            setattr(owner, name, self.timed(getattr(owner, name), clock))


class Cost(NamedTuple):
    """Of one training.

    Attributes:
        wall: seconds.
        processor: seconds of all threads.
        counted: seconds in the added work.
    """

    wall: float
    processor: float
    counted: float


def count_checkpoints(trainer: Trainer, spent: Spent) -> None:
    """Count the copy of the state and the processor time of the writer."""
    spent.watch(trainer, "_save")
    spent.watch(trainer.checkpoints, "_keep_the_one_before", "_remove_old", clock=time.thread_time)
    spent.watch(trainer.metrics_file, "sync", clock=time.thread_time)


def count_collectives(trainer: Trainer, spent: Spent) -> None:
    """Count what a step does for other processes."""
    total = trainer.train_step._sum
    assert total is not None
    buckets = [*total.buckets, total._statistics_bucket]
    for bucket in buckets:
        if bucket is not None:
            spent.watch(bucket, "send", "receive")
    spent.watch(trainer.vote, "cast", "settle")


def train_seconds(config: Config, ranks: Ranks, checkpoints: bool) -> Cost:
    """Wall and processor time of the training of a new run, and the time in the added work."""
    write, spent = checkpoint.save_checkpoint, Spent()
    with tempfile.TemporaryDirectory() as folder:
        display = Display(Console(quiet=True))
        trainer = Trainer(config, Path(folder) / "run", display=display, ranks=ranks)
        if checkpoints:
            count_checkpoints(trainer, spent)
            checkpoint.save_checkpoint = spent.timed(write, time.thread_time)
        else:
            trainer._save = lambda: None  # type: ignore[method-assign]
        if not ranks.alone:
            count_collectives(trainer, spent)
        try:
            with display.training(trainer.total_steps, 0) as bar:
                start, processor = time.perf_counter(), time.process_time()
                trainer._train_or_roll_back(bar, StopRequest())
                spent.timed(trainer.checkpoints.wait, time.perf_counter)()
                wall, processor = time.perf_counter() - start, time.process_time() - processor
        finally:
            checkpoint.save_checkpoint = write
        trainer.vote.settle()
        assert trainer.metrics_file is not None
        trainer.metrics_file.close()
        if trainer.tensorboard is not None:
            trainer.tensorboard.close()
        return Cost(wall, processor, spent.seconds)


CONTESTANTS = {
    "plain": (False, False),
    "checkpoints": (False, True),
    "distributed": (True, False),
    "both": (True, True),
}
"""Whether each is the process of a job, and whether it writes checkpoints."""


def serve(line: Connection, job: dict[str, str], epochs: int, device: str) -> None:
    """Train as often as asked, with checkpoints or without, until the line is closed.

    Args:
        line: receives whether to write checkpoints; answers with the cost.
        job: the variables that torchrun sets; none for a process of its own.
        epochs: of each training.
        device: as configured.
    """
    os.environ.update(job)
    with join(device) as ranks:
        for checkpoints in (False, True):
            train_seconds(configuration(1, device), ranks, checkpoints)
        line.send("ready")
        while True:
            try:
                checkpoints = line.recv()
            except EOFError:
                return
            line.send(train_seconds(configuration(epochs, device), ranks, checkpoints))


def measure(rounds: int, epochs: int, device: str) -> dict[str, list[Cost]]:
    """The cost of each contestant in each round."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    job.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    for variables in ({}, job):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, variables, epochs, device))
        process.start()
        there.close()
        # One after the other, so that neither warms up beside the other.
        assert here.recv() == "ready"
        lines.append(here)
        processes.append(process)
    found: dict[str, list[Cost]] = {name: [] for name in CONTESTANTS}
    names = list(CONTESTANTS)
    for number in range(rounds):
        # In another order each time: what comes first is not always the same.
        for name in names[number % 4 :] + names[: number % 4]:
            in_job, checkpoints = CONTESTANTS[name]
            lines[in_job].send(checkpoints)
            found[name].append(lines[in_job].recv())
    for line, process in zip(lines, processes, strict=True):
        line.close()
        process.join()
    return found


def main() -> int:
    """Measure, print and write a record under ``benchmarks/results``.

    Returns:
        0, or 1 where a counted overhead reaches the target.
    """
    parser = argparse.ArgumentParser(description="Cost of checkpoints and of the distributed path.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=1, help="of each contestant in each round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="file of the record")
    options = parser.parse_args()
    now = datetime.datetime.now(datetime.timezone.utc)
    device = ALONE.device(options.device)
    seconds = measure(options.rounds, options.epochs, options.device)
    results: dict[str, Any] = {}
    for name, values in seconds.items():
        results[name] = {}
        counted = [value.counted / (value.wall - value.counted) for value in values]
        results[name]["counted"] = {
            "round_overheads": counted,
            "overhead": statistics.median(counted),
        }
        print(
            f"{name:12} counted    {100 * statistics.median(counted):+.2f} % "
            f"(rounds {100 * min(counted):+.2f} to {100 * max(counted):+.2f})"
        )
        for kind in ("wall", "processor"):
            own = [getattr(value, kind) for value in values]
            plain = [getattr(value, kind) for value in seconds["plain"]]
            overheads = [mine / other - 1 for mine, other in zip(own, plain, strict=True)]
            results[name][kind] = {
                "round_seconds": own,
                "round_overheads": overheads,
                "overhead": statistics.median(overheads),
            }
            print(
                f"{name:12} {kind:10} {statistics.median(own):7.3f} s, overhead "
                f"{100 * statistics.median(overheads):+.2f} % "
                f"(rounds {100 * min(overheads):+.2f} to {100 * max(overheads):+.2f})"
            )
    path = new_record("overhead", options.out, device, now)
    write_json(
        path,
        {
            "kind": "distributed overhead",
            "date": now.isoformat(timespec="seconds"),
            "machine": describe_machine(device),
            "threads": torch.get_num_threads(),
            "settings": {"recipe": "digits", "epochs": options.epochs, "rounds": options.rounds},
            "target": TARGET,
            "results": results,
        },
    )
    print(f"record: {path}")
    return int(any(found["counted"]["overhead"] >= TARGET for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
