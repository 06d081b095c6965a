"""``arat-fast train`` on a few digits, with the accident that it is told to have.

As a program: ``python drills.py JSON`` with the fields of :class:`Drill`, for torchrun.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tiny import OPTIONS
from torch import Tensor

import arat_fast.distributed.watch as watch_module
import arat_fast.report
import arat_fast.run.loop as loop_module
import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.cli import main as command_line
from arat_fast.data.plan import Place
from arat_fast.display import SuiteProgress, Unit
from arat_fast.run.hooks import Hook
from arat_fast.run.state import Run
from arat_fast.training.values import Values

STEPS_PER_EPOCH = 4
BASE = ["train", "digits", *OPTIONS, "--eval.max-samples", "8", "--train.eval-every", "0"]


@dataclass(frozen=True)
class Drill:
    """One start of a run.

    Attributes:
        accident: "none"; a signal's name; "kill" (SIGKILL) or "nan" in a step; "nan once", of which
            a second attempt is spared; "kill in write" or "full disk" in writing a checkpoint;
            "launcher" (SIGTERM to torchrun's, before a step); "evaluation" (SIGTERM in it, while
            the other ranks still evaluate).
        step: in which it happens, or after which a checkpoint is written.
        rank: to which it happens; None: to all.
        out: folder of the run.
        extra: further arguments of the command line.
        first_attempt_only: torchrun's restarts are spared.
        watched: every rank writes what each step is given, :class:`Watch`.
    """

    accident: str = "none"
    step: int = 0
    rank: int | None = None
    out: str = ""
    extra: tuple[str, ...] = ()
    first_attempt_only: bool = False
    watched: bool = False


class Accident(Hook):
    """Happens to a run, or to its files."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.had_it = False

    def begin(self, run: Run) -> None:
        self.run = run
        if self.drill.accident == "evaluation":
            run.interruptible = self.interruptible(run.interruptible)  # type: ignore[method-assign]
        elif self.drill.rank not in (None, run.ranks.rank):
            return
        elif self.drill.accident in ("kill in write", "full disk"):
            checkpoint_module.write_atomic = self.broken_write(checkpoint_module.write_atomic)
        else:
            # Called before every step.
            set_rate = run.set_rate
            run.set_rate = lambda: (set_rate(), self.before_step())[0]  # type: ignore[method-assign, func-returns-value]

    def before_step(self) -> None:
        accident = self.drill.accident
        if self.run.progress.step != self.drill.step or self.had_it:
            return
        self.had_it = accident == "nan once"
        if accident == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif accident.startswith("nan"):
            # It reaches the loss, the gradients and the other ranks' weights.
            with torch.no_grad():
                next(self.run.model.parameters()).fill_(float("nan"))
        elif accident == "launcher":
            os.kill(os.getppid(), signal.SIGTERM)
            # Until torchrun's signal to the process group has come.
            time.sleep(3)
        else:
            os.kill(os.getpid(), getattr(signal, accident))

    def interruptible(self, make: Callable[..., SuiteProgress]) -> Callable[..., SuiteProgress]:
        def broken(*arguments: Any) -> SuiteProgress:
            progress = make(*arguments)

            def told(name: str, done: int, total: int, unit: Unit = "images") -> None:
                here = self.run.progress.step == self.drill.step
                if here and self.run.ranks.rank == self.drill.rank:
                    os.kill(os.getpid(), signal.SIGTERM)
                deadline = time.monotonic() + 120
                while here and time.monotonic() < deadline:
                    progress(name, done, total)
                    time.sleep(0.05)
                progress(name, done, total)

            return told

        return broken

    def broken_write(self, whole: Callable[..., None]) -> Callable[..., None]:
        def broken(path: Path, write: Any) -> None:
            def half(file: BinaryIO) -> None:
                write(file)
                if self.run.progress.step < self.drill.step:
                    return
                if self.drill.accident == "full disk":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.truncate(file.tell() // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            whole(path, half)

        return broken


class Watch(Hook):
    """Writes into ``OUT.seen``, for each step and rank, what the step is given: samples, crops, the
    generator of its random start, and before the first one the whole state."""

    def __init__(self, drill: Drill) -> None:
        self.folder = Path(f"{drill.out}.seen")

    def begin(self, run: Run) -> None:
        self.folder.mkdir(exist_ok=True)
        step, first = run.step.from_indices, run.progress.step

        def watched(index: Tensor, draws: Tensor, *, place: Place) -> Values:
            assert run.step.generator is not None
            seen: dict[str, Any] = {"index": index, "draws": draws, "first": place.first}
            seen["generator"] = run.step.generator.get_state()
            if run.progress.step == first:
                names = ("model", "objective", "optimizer", "average")
                seen["state"] = {name: run.parts[name].state_dict() for name in names}
            torch.save(seen, self.folder / f"step{run.progress.step}-rank{run.ranks.rank}.pt")
            return step(index, draws, place=place)

        run.step.from_indices = watched  # type: ignore[method-assign, assignment]


def run(drill: Drill) -> int:
    """Run ``arat-fast train`` in this process; its exit code."""
    # The report would be most of the time.
    arat_fast.report.write_report = lambda out: Path(out) / "report.html"
    # A process is lost sooner than outside of tests.
    watch_module.BEAT_SECONDS, watch_module.LOST_SECONDS = 0.2, 1.5
    spared = drill.first_attempt_only and os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0"
    hooks: list[Hook] = [Watch(drill)] if drill.watched else []
    if drill.accident != "none" and not spared:
        hooks.append(Accident(drill))
    loop_module.train = functools.partial(loop_module.train, hooks=hooks)
    return command_line([*BASE, *drill.extra, "--out", drill.out, "--resume"])


def as_rank(drill: Drill) -> None:
    """One rank of a job."""
    sys.exit(run(drill))


def as_json(drill: Drill) -> str:
    return json.dumps(dataclasses.asdict(drill))


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    sys.exit(run(Drill(**{**values, "extra": tuple(values["extra"])})))
