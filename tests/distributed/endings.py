"""Ends of a job: processes that join, do one thing and end."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

import arat_fast.distributed.watch as watch_module
from arat_fast.distributed import LeftBehindError, Ranks, join
from arat_fast.stop import InterruptedRun

SILENT_SECONDS = 2.0
TIMEOUT = 3.0
LATE = TIMEOUT + 1


def late(ranks: Ranks) -> None:
    """Rank 0 writes for longer than a collective waits, and than a silence may last."""
    if ranks.is_main:
        time.sleep(LATE)
    ranks.meet()
    ranks.largest(1)


def late_stop(ranks: Ranks) -> None:
    """A stop that all have agreed on, after which rank 0 takes its time."""
    if ranks.is_main:
        time.sleep(LATE)
    raise InterruptedRun("stopped", 75)


def error_at_the_end(ranks: Ranks) -> None:
    """Rank 0 fails while the others are done and wait for it."""
    if ranks.is_main:
        time.sleep(1)
        raise ValueError("a disk that cannot be written")


def error_in_collective(ranks: Ranks) -> None:
    """Rank 1 fails while the others wait in a collective."""
    if ranks.rank == 1:
        raise ValueError("a disk that cannot be read")
    ranks.largest(1)


def error_elsewhere(ranks: Ranks) -> None:
    """Rank 1 fails while the others work by themselves, and would for long."""
    if ranks.rank == 1:
        raise ValueError("a disk that cannot be read")
    time.sleep(60)


def lost_in_meeting(ranks: Ranks) -> None:
    """Rank 1 dies where no collective fails."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.meet()


def lost_in_collective(ranks: Ranks) -> None:
    """Rank 0 dies while the others wait for it in a collective."""
    if ranks.is_main:
        # The others may still be joining.
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.largest(1)


def machine_lost(ranks: Ranks) -> None:
    """Ranks 1 and 0 die, rank 2 waits for them."""
    ranks.meet()
    if ranks.rank < 2:
        time.sleep(1 - ranks.rank)
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.meet()


def hang(ranks: Ranks) -> None:
    """Rank 1 lives and does not come to a collective."""
    if ranks.rank == 1:
        time.sleep(60)
    ranks.largest(1)


def stopped(ranks: Ranks) -> None:
    """Rank 1 stands still, without signs of life."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.meet()


def as_rank(ending: str, environment: dict[str, str], log: str) -> None:
    """Body of a forked process: one rank, which says what the command line would, in a file."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    watch_module.BEAT_SECONDS, watch_module.LOST_SECONDS = 0.1, 1.0
    watch_module.SILENT_SECONDS, watch_module.LEAVE_SECONDS = SILENT_SECONDS, 3.0
    try:
        with join("cpu", TIMEOUT) as ranks:
            globals()[ending](ranks)
    except InterruptedRun as error:
        sys.exit(error.exit_code)
    except LeftBehindError as error:
        if str(error):
            print(f"error: {error}", flush=True)
        os._exit(error.exit_code)
    except ValueError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
