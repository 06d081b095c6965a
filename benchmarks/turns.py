"""Contestants of the training step at one size, which take turns in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arat_fast.settings import Count
from benchmarks.contestants import Batch, Contestant, Run, choose
from benchmarks.harness import Bench, Options, alternate, spread
from benchmarks.measure import (
    PeakMemory,
    failure,
    free_memory,
    is_out_of_memory,
    load_libraries,
    seconds,
)
from benchmarks.official import check_official
from benchmarks.workload import Workload

WARM_UP = {"cuda": 3, "cpu": 1}
"""Steps before anything is timed: cuDNN's choice, compilation."""
WARM_UP_GRAPH = 5
"""The same with a CUDA graph of ours, which is captured in the fourth step."""
NUM_BATCHES = 4
"""Different batches, which take turns."""


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """What benchmarks of the training step take."""

    model: str = "resnet18"
    """resnet18, wrn34-10, or resnet8."""
    contestants: tuple[str, ...] = ()
    """naive, tuned, compiled, official, fast, fast-folded; on a GPU also compiled-graphs,
    compiled-autotune and fast-eager."""
    steps: Count | None = None
    """Training steps in a turn."""
    official: Path | None = None
    """Checkout of the official AR-AT code, which then takes part, unmodified. Its code runs."""


@dataclass(frozen=True)
class Turns:
    """Times contestants.

    Attributes:
        bench: to whose record everything goes.
        contestants: by name.
        steps: training steps in a turn.
        longest: seconds; a turn has fewer steps, but at least one, where they would take longer.
    """

    bench: Bench[Any]
    contestants: dict[str, Contestant]
    steps: int
    longest: float = math.inf

    @classmethod
    def chosen(
        cls,
        bench: Bench[Any],
        names: Sequence[str],
        steps: int,
        workload: Workload,
        longest: float = math.inf,
    ) -> Turns:
        """The contestants of these names, described in the record.

        Raises:
            ValueError: one is unknown or cannot take part.
            FileNotFoundError: the official code is not where it is said to be.
        """
        official = bench.options.official
        if official is not None:
            check_official(official, workload)
        contestants = choose(names, bench.device, official)
        load_libraries(bench.device)
        bench.record["settings"] |= {
            "contestants": {name: c.what for name, c in contestants.items()},
            "rounds": bench.options.rounds,
            "steps": steps,
        }
        return cls(bench, contestants, steps, longest)

    def measure(self, workload: Workload, compiles: bool = True) -> list[dict[str, Any]]:
        """Time all contestants at one size; those that torch.compile makes only where ``compiles``.

        Those that do not fit into memory beside the others run afterwards, in a group of their own.

        Returns:
            An entry for each: times, images/s and memory, or why there are none.
        """
        device = self.bench.device
        batches = workload.batches(NUM_BATCHES, device, seed=0)
        entries: dict[str, dict[str, Any]] = {}
        pending = {n: c for n, c in self.contestants.items() if compiles or not c.compiles}
        if any(contestant.compiles for contestant in pending.values()):
            torch.compiler.reset()
        group = 0
        while pending:
            turns, deferred = self._prepare(workload, pending, batches, entries)
            times, failures = alternate(
                turns,
                self.bench.options.rounds,
                lambda name, done, value: self.bench.say(
                    f"batch {workload.batch_size}  {name:18} turn {done}/"
                    f"{self.bench.options.rounds}  {workload.batch_size / value:,.1f} images/s"
                ),
            )
            for name, failed in failures.items():
                if failed["status"] == "out of memory" and len(turns) > 1:
                    deferred.append(name)
                else:
                    entries[name] |= failed
            for name, values in times.items():
                median = statistics.median(values)
                entries[name] |= {
                    "status": "measured",
                    "group": group,
                    "round_seconds_per_step": values,
                    "seconds_per_step": median,
                    "spread": spread(values),
                    "images_per_second": workload.batch_size / median,
                }
                if device.type == "cpu":
                    entries[name]["processor_seconds_per_step"] = turns[name].processor_seconds()
            turns.clear()
            free_memory(device)
            pending = {name: pending[name] for name in pending if name in deferred}
            group += 1
        found = [entries[name] for name in self.contestants if name in entries]
        for entry in found:
            if entry["status"] == "failed":
                self.bench.problem(
                    f"{entry['contestant']} at batch {workload.batch_size}: {entry['reason']}"
                )
        return found

    def _prepare(
        self,
        workload: Workload,
        pending: dict[str, Contestant],
        batches: list[Batch],
        entries: dict[str, dict[str, Any]],
    ) -> tuple[dict[str, _Turn], list[str]]:
        """Those that are built and warm, and the names of those that must wait for memory."""
        turns: dict[str, _Turn] = {}
        deferred: list[str] = []
        for name, contestant in pending.items():
            self.bench.say(f"batch {workload.batch_size}  {name:18} warming up")
            entry: dict[str, Any] = {
                "contestant": name,
                "ours": contestant.ours,
                "attack_bn": contestant.bn,
                "batch_size": workload.batch_size,
            }
            entries[name] = entry
            memory = PeakMemory(self.bench.device)
            try:
                began = time.perf_counter()
                run = warm(contestant, workload, self.bench.device, batches)
                entry["warm_up_seconds"] = time.perf_counter() - began
                entry["peak_memory_bytes"] = memory.read()
                turns[name] = _Turn(self, contestant, run, batches)
            except Exception as error:
                if is_out_of_memory(error) and turns:
                    deferred.append(name)
                else:
                    entry |= failure(error)
        return turns, deferred


class _Turn:
    """A contestant that is warm; each call is a turn, of which it returns the seconds per step."""

    def __init__(
        self, turns: Turns, contestant: Contestant, run: Run, batches: list[Batch]
    ) -> None:
        self.device, self.contestant, self.run = turns.bench.device, contestant, run
        steps = turns.steps
        if turns.longest < math.inf:
            with contestant.settings():
                one = seconds(partial(run, batches[:1]), self.device)
            steps = max(1, min(steps, round(turns.longest / one)))
        self.batches = [batches[i % len(batches)] for i in range(steps)]
        self._processor: list[float] = []

    def __call__(self) -> float:
        steps = len(self.batches)
        with self.contestant.settings():
            if self.device.type == "cuda":
                # Another contestant has just used the memory and the caches.
                free_memory(self.device)
                self.run(self.batches[:1])
            began = time.process_time()
            took = seconds(partial(self.run, self.batches), self.device)
            self._processor.append((time.process_time() - began) / steps)
            return took / steps

    def processor_seconds(self) -> float:
        """Of all threads, per step, the median of the turns."""
        return statistics.median(self._processor)


def warm(
    contestant: Contestant, workload: Workload, device: torch.device, batches: list[Batch]
) -> Run:
    """A contestant that is built and ready to be timed."""
    with contestant.settings():
        run = contestant.build(workload, device)
        number = WARM_UP_GRAPH if contestant.graph else WARM_UP[device.type]
        seconds(partial(run, [batches[i % len(batches)] for i in range(number)]), device)
    return run


def best_baselines(
    results: Sequence[dict[str, Any]], field: str = "seconds_per_step"
) -> dict[str, float]:
    """``field`` of each baseline of one size; of the compiled ones, the smallest.

    Args:
        results: entries with "contestant", "ours", "status" and, where measured, ``field``.
        field: a time per step.
    """
    found: dict[str, float] = {}
    for entry in results:
        if entry["ours"] or entry["status"] != "measured":
            continue
        name = "compiled" if entry["contestant"].startswith("compiled") else entry["contestant"]
        found[name] = min(entry[field], found.get(name, float("inf")))
    return found
