"""Ends of a job: ``arat-fast train`` with a trainer that does nothing but end in some way."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

import arat_fast.distributed.watch as watch_module
import arat_fast.report
import arat_fast.run.loop as loop_module
from arat_fast.cli import main as command_line
from arat_fast.distributed import Ranks
from arat_fast.stop import InterruptedRun

SILENT_SECONDS = 2.0
LATE = 2.5 * SILENT_SECONDS


def late(ranks: Ranks) -> None:
    """Rank 0 writes for longer than a silence may last."""
    if ranks.is_main:
        time.sleep(LATE)


def late_stop(ranks: Ranks) -> None:
    """The same with a stop that all have agreed on."""
    late(ranks)
    raise InterruptedRun("stopped", 75)


def late_error(ranks: Ranks) -> None:
    """Rank 0 fails while the others wait for it."""
    if ranks.is_main:
        time.sleep(1)
        raise ValueError("a disk that cannot be written")


def error_before_meeting(ranks: Ranks) -> None:
    """Rank 1 fails while the others wait in a meeting."""
    if ranks.rank == 1:
        time.sleep(1)
        raise ValueError("a disk that cannot be read")
    try:
        ranks.meet()
    finally:
        print("arat-fast: the meeting is over")


def machine_lost(ranks: Ranks) -> None:
    """Ranks 1 and 0 die, rank 2 waits for them."""
    ranks.meet()
    if ranks.rank < 2:
        time.sleep(1 - ranks.rank)
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.meet()


def lost_in_meeting(ranks: Ranks) -> None:
    """Rank 1 dies where no collective fails."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.meet()


ENDINGS = {
    body.__name__: body
    for body in (
        late,
        late_stop,
        late_error,
        error_before_meeting,
        machine_lost,
        lost_in_meeting,
    )
}


def as_rank(ending: str, environment: dict[str, str], log: str) -> None:
    """Body of a forked process: one rank, its output in a file."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    watch_module.BEAT_SECONDS, watch_module.LOST_SECONDS = 0.1, 1.0
    watch_module.SILENT_SECONDS = SILENT_SECONDS

    class Trainer:
        def __init__(self, *_: Any, ranks: Ranks, **__: Any) -> None:
            self.ranks = ranks

        def run(self) -> dict[str, Any]:
            ENDINGS[ending](self.ranks)
            return {"accuracy": {}}

    loop_module.Trainer = Trainer  # type: ignore[misc, assignment]
    arat_fast.report.write_report = lambda out: out
    sys.exit(command_line(["train", "digits", "--train.device", "cpu"]))
