"""Contestants of the training step at one size, which take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.contestants import Batch, Contestant, Run
from benchmarks.harness import Bench, Record, alternate, spread
from benchmarks.measure import PeakMemory, failure, free_memory, is_out_of_memory, seconds
from benchmarks.workload import Workload

WARM_UP = {"cuda": 3, "cpu": 1}
"""Steps before anything is timed: cuDNN's choice, compilation."""
WARM_UP_GRAPH = 5
"""The same with a CUDA graph of ours, which is captured in the fourth step."""
NUM_BATCHES = 4
"""Different batches, which take turns."""


def take_turns(
    bench: Bench[Any], contestants: Mapping[str, Contestant], workload: Workload, steps: int
) -> list[Record]:
    """Time all contestants at one size.

    Those that do not fit into memory beside the others run afterwards, in a group of their own.

    Args:
        bench: which is told of progress and of problems.
        contestants: by name.
        workload: the size.
        steps: training steps in a turn.

    Returns:
        An entry for each: times, images/s and memory, or why there are none.
    """
    device = bench.device
    batches = workload.batches(NUM_BATCHES, device, seed=0)
    entries: dict[str, Record] = {
        name: {
            "contestant": name,
            "ours": contestant.ours,
            "attack_bn": contestant.bn,
            **asdict(workload),
        }
        for name, contestant in contestants.items()
    }
    if any(contestant.compiles for contestant in contestants.values()):
        torch.compiler.reset()
    pending, group = list(contestants), 0
    while pending:
        turns: dict[str, _Turn] = {}
        waiting: list[str] = []
        for name in pending:
            bench.say(f"{workload}  {name:18} warming up")
            memory, began = PeakMemory(device), time.perf_counter()
            try:
                # No name of its own for what is built: it would outlive its turns.
                turns[name] = _Turn(
                    contestants[name],
                    warm(contestants[name], workload, device, batches),
                    [batches[i % NUM_BATCHES] for i in range(steps)],
                    device,
                )
            except Exception as error:
                if is_out_of_memory(error) and turns:
                    waiting.append(name)
                else:
                    entries[name] |= failure(error)
                continue
            entries[name]["warm_up_seconds"] = time.perf_counter() - began
            entries[name]["peak_memory_bytes"] = memory.read()
        times, failures = alternate(
            turns,
            bench.options.rounds,
            lambda name, done, value: bench.say(
                f"{workload}  {name:18} turn {done}/{bench.options.rounds}  "
                f"{workload.batch_size / value:,.1f} images/s"
            ),
        )
        for name, failed in failures.items():
            if failed["status"] == "out of memory" and len(turns) > 1:
                waiting.append(name)
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
                processor = statistics.median(turns[name].processor_seconds)
                entries[name]["processor_seconds_per_step"] = processor
        turns.clear()
        free_memory(device)
        pending, group = [name for name in pending if name in waiting], group + 1
    for name, entry in entries.items():
        if entry["status"] == "failed":
            bench.problem(f"{name}, {workload}: {entry['reason']}")
    return list(entries.values())


@dataclass
class _Turn:
    """A contestant that is warm; each call is a turn, of which it returns the seconds per step."""

    contestant: Contestant
    run: Run
    batches: list[Batch]
    device: torch.device
    processor_seconds: list[float] = field(default_factory=list)
    """Of all threads, per step, in each turn."""

    def __call__(self) -> float:
        steps = len(self.batches)
        with self.contestant.settings():
            if self.device.type == "cuda":
                # Another contestant has just used the memory and the caches.
                free_memory(self.device)
                self.run(self.batches[:1])
            began = time.process_time()
            took = seconds(partial(self.run, self.batches), self.device)
            self.processor_seconds.append((time.process_time() - began) / steps)
            return took / steps


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
