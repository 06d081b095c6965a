"""``arat-fast train`` on a few digits, with the accident that it is told to have.

As a program: ``python drills.py JSON`` with the fields of :class:`Drill`, for torchrun.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import time
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

STEPS_PER_EPOCH = 4
BASE = ["train", "digits", *OPTIONS, "--eval.max-samples", "8", "--train.eval-every", "0"]


@dataclass(frozen=True)
class Drill:
    """One start of a run.

    Attributes:
        out: folder of the run.
        accident: "none"; a signal's name; "kill" (SIGKILL) or "nan" in a step; "nan once", of which
            a second attempt is spared; "kill in write" or "full disk" in writing a checkpoint;
            "launcher" (SIGTERM to torchrun's, before a step); "evaluation" (SIGTERM in it, while
            the other ranks still evaluate).
        step: in which it happens, or after which a checkpoint is written.
        rank: to which it happens; None: to all.
        extra: further arguments of the command line.
        first_attempt_only: torchrun's restarts are spared.
    """

    out: str
    accident: str = "none"
    step: int = 0
    rank: int | None = None
    extra: tuple[str, ...] = ()
    first_attempt_only: bool = False


def run(drill: Drill) -> int:
    """Run ``arat-fast train`` in this process; its exit code."""
    torch.set_num_threads(1)
    # The report would be most of the time.
    arat_fast.report.write_report = lambda out: Path(out) / "report.html"
    spared = drill.first_attempt_only and os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0"
    # A process is lost sooner than outside of tests.
    watch_module.BEAT_SECONDS, watch_module.LOST_SECONDS = 0.2, 1.5
    if drill.accident != "none" and not spared:
        loop_module.Trainer = prepared(drill)  # type: ignore[misc]
    return command_line([*BASE, *drill.extra, "--out", drill.out, "--resume"])


def prepared(drill: Drill) -> Any:
    """A trainer that has the accident."""

    class Unlucky(loop_module.Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.had_it = False
            if drill.accident == "evaluation":
                break_evaluations(self, drill)
                return
            if drill.rank in (None, self.ranks.rank):
                if drill.accident in ("kill in write", "full disk"):
                    break_writes(self, drill)
                elif drill.accident == "launcher":
                    end_launcher(self, drill)
                else:
                    break_steps(self, drill)

    return Unlucky


def break_steps(trainer: Any, drill: Drill) -> None:
    step = trainer.train_step.from_indices

    def accident(index: Tensor, draws: Tensor, **place: Any) -> dict[str, Tensor]:
        if trainer.step != drill.step or trainer.had_it:
            result: dict[str, Tensor] = step(index, draws, **place)
            return result
        trainer.had_it = drill.accident == "nan once"
        if drill.accident == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if drill.accident.startswith("nan"):
            # Before the step: it reaches the loss, the gradients and the other ranks' weights.
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))
        else:
            os.kill(os.getpid(), getattr(signal, drill.accident))
        result = step(index, draws, **place)
        return result

    trainer.train_step.from_indices = accident


def break_evaluations(trainer: Any, drill: Drill) -> None:
    make = trainer._progress

    def broken(*arguments: Any) -> Any:
        progress = make(*arguments)

        def accident(name: str, done: int, total: int) -> None:
            if trainer.step == drill.step and trainer.ranks.rank == drill.rank:
                os.kill(os.getpid(), signal.SIGTERM)
            elif trainer.step == drill.step:
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline:
                    progress(name, done, total)
                    time.sleep(0.05)
            progress(name, done, total)

        return accident

    trainer._progress = broken


def end_launcher(trainer: Any, drill: Drill) -> None:
    set_rate = trainer._set_rate

    def accident() -> None:
        set_rate()
        if trainer.step == drill.step:
            os.kill(os.getppid(), signal.SIGTERM)
            # Until torchrun's signal to the process group has come.
            time.sleep(3)

    trainer._set_rate = accident


def break_writes(trainer: Any, drill: Drill) -> None:
    whole = checkpoint_module.write_atomic

    def broken(path: Path, write: Any) -> None:
        def half(file: BinaryIO) -> None:
            write(file)
            if trainer.step < drill.step:
                return
            if drill.accident == "full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate(file.tell() // 2)
            file.flush()
            (Path(drill.out) / "writing").touch()
            # The test kills all ranks meanwhile; this one would end by itself otherwise.
            time.sleep(20)
            os.kill(os.getpid(), signal.SIGKILL)

        whole(path, half)

    checkpoint_module.write_atomic = broken


def as_rank(drill: Drill, environment: dict[str, str], log: str) -> None:
    """Body of a forked process: one rank, its output in a file."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(run(drill))


def as_json(drill: Drill) -> str:
    return json.dumps(dataclasses.asdict(drill))


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    sys.exit(run(Drill(**{**values, "extra": tuple(values["extra"])})))
