"""Runs the grid of a comparison, each cell in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arat_fast.compare.plan import FORMAT, RECORD, Cell, Plan, plan_to_dict
from arat_fast.compare.results import read_cell
from arat_fast.config import config_to_dict
from arat_fast.device import count_gpus, source_commit, versions
from arat_fast.files import LOCK, Lock, write_json
from arat_fast.stop import PARENT, InterruptedRun, stop_on_signals

_POLL_SECONDS = 0.2
_LOGS = "logs"
_PATIENCE_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    started: float


@dataclass
class GridRunner:
    """Runs what is missing of a plan.

    Args:
        plan: the grid.
        out: folder of the comparison; made if absent.
        jobs: runs at a time; None for one on a CPU, one per GPU else.
        say: told each line for the user.

    Raises:
        ValueError: ``jobs`` is no count >= 1, or larger than the number of GPUs.
    """

    plan: Plan
    out: Path
    jobs: int | None
    say: Say

    def __post_init__(self) -> None:
        self._slots = environments(self.plan.config.train.device, self.jobs)
        self._grid = self.plan.cells()
        self._cells: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Run every cell that is not finished.

        Returns:
            The content of comparison.json.

        Raises:
            InterruptedRun: Ctrl-C or SIGTERM came; the runs have saved their state and ended.
            BlockingIOError: another comparison, or a run that it left, is at work in the folder.
            ValueError: a run in the folder is of another configuration.
        """
        with Lock(self.out / LOCK) as lock, stop_on_signals() as stop:
            pending = [cell for cell in self._grid if not self._take(cell)]
            self._save()
            total, start = len(pending), time.monotonic()
            if total < len(self._grid):
                done = len(self._grid) - total
                self.say(f"{done} of {len(self._grid)} runs are finished already")
            if pending:
                parallel, logs = len(self._slots), self.out / _LOGS
                self.say(f"{total} runs, {parallel} at a time; what they print is in {logs}")
            jobs: list[_Job] = []
            try:
                while (pending or jobs) and not stop.signal:
                    while pending and len(jobs) < len(self._slots):
                        jobs.append(self._start(pending.pop(0), jobs, lock))
                    for job in [j for j in jobs if j.process.poll() is not None]:
                        jobs.remove(job)
                        left = len(pending) + len(jobs)
                        spent = time.monotonic() - start
                        self._end(job, left, spent * left / (total - left))
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop(jobs)
            if stop.signal:
                finished = sum(self._take(job.cell) for job in jobs)
                self._save()
                left = len(pending) + len(jobs) - finished
                raise InterruptedRun(
                    f"stopped with {left} of {len(self._grid)} runs left; go on with the same "
                    "command",
                    stop.exit_code,
                )
        return self._save()

    def _start(self, cell: Cell, jobs: Sequence[_Job], lock: Lock) -> _Job:
        slot = min({*range(len(self._slots))} - {job.slot for job in jobs})
        log = self.out / _LOGS / f"{cell.run}.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "arat_fast", *cell.arguments(self.out)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._slots[slot], PARENT: str(os.getpid())},
                # Ctrl-C reaches this process alone, which ends its children in order.
                start_new_session=True,
                # The folder stays locked as long as one of them lives.
                pass_fds=(lock.fileno(),),
            )
        return _Job(cell, process, slot, time.monotonic())

    def _end(self, job: _Job, left: int, seconds_left: float) -> None:
        cell, seconds = job.cell, time.monotonic() - job.started
        rest = f"{left} left, about {seconds_left / 60:.0f} min" if left else "all done"
        if job.process.returncode == 0 and self._take(cell):
            found = self._cells[cell.run]["accuracy"].items()
            values = [f"{n} {100 * e['value']:.1f}" for n, e in found if n != "clean_branch"]
            self.say(f"{cell.run}: {', '.join(values)} ({seconds:.0f} s; {rest})")
        else:
            reason = self._reason(cell, job.process.returncode)
            self._cells[cell.run].update(status="failed", reason=reason)
            self.say(f"{cell.run}: failed: {reason} ({rest})")
        self._save()

    def _reason(self, cell: Cell, code: int) -> str:
        text = (self.out / _LOGS / f"{cell.run}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it printed nothing"
        return f"exit code {code}, {last.removeprefix('arat-fast: error: ')}"

    def _stop(self, jobs: Sequence[_Job]) -> None:
        """Let the runs save their state and end; kill what does not within half a minute."""
        for job in jobs:
            job.process.terminate()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            for job in jobs:
                job.process.wait(max(deadline - time.monotonic(), 0.1))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for job in jobs:
                job.process.kill()
                job.process.wait()

    def _take(self, cell: Cell) -> bool:
        """Put what the folder of a run holds into the record; whether it is finished."""
        config = config_to_dict(cell.config)
        found = read_cell(self.out / cell.run, cell.config)
        finished = found is not None and found["evaluation"] == config["eval"]
        self._cells[cell.run] = {
            "label": cell.label,
            "seed": cell.seed,
            "run": cell.run,
            "status": "finished" if finished else "pending",
            "command": shlex.join(["arat-fast", *cell.arguments(self.out)]),
            "config": config,
            **(found if found and finished else {}),
        }
        return finished

    def _save(self) -> dict[str, Any]:
        # As far as the environment says: results depend on their number to rounding.
        threads = {**os.environ, **self._slots[0]}.get("OMP_NUM_THREADS", "")
        record = {
            "format": FORMAT,
            **plan_to_dict(self.plan),
            "jobs": len(self._slots),
            "threads": int(threads) if threads.isdigit() else None,
            "versions": versions(),
            "commit": source_commit(),
            "cells": list(self._cells.values()),
        }
        write_json(self.out / RECORD, record)
        return record


def environments(device: str, jobs: int | None) -> list[dict[str, str]]:
    """Environment variables of each run that goes on at the same time.

    On GPUs each has one of its own; on a CPU the cores are divided among them, unless
    OMP_NUM_THREADS is set.

    Args:
        device: ``train.device`` of the runs.
        jobs: how many; None for one on a CPU, one per GPU else.

    Raises:
        ValueError: ``jobs`` is no count >= 1, or larger than the number of GPUs.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be >= 1, got {jobs}")
    one = device.startswith("cuda:")
    gpus = 1 if one else count_gpus() if device in ("auto", "cuda") else 0
    if gpus:
        if jobs is not None and jobs > gpus:
            raise ValueError(f"--jobs must be at most the {gpus} GPUs, one run on each, got {jobs}")
        if gpus == 1:
            return [{}]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: jobs or gpus]]
    count = jobs or 1
    if os.environ.get("OMP_NUM_THREADS"):
        return [{}] * count
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count
