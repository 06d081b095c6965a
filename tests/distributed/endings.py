"""Ends of a job: processes that join, do what they are told and end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import arat_fast.distributed.watch as watch_module
from arat_fast.distributed import LeftBehindError, Ranks, join
from arat_fast.stop import InterruptedRun

SILENT_SECONDS = 2.0
TIMEOUT = 3.0
LATE = str(TIMEOUT + 1)
"""Longer than a collective waits, and than a silence may last."""


def act(ranks: Ranks, action: str) -> None:
    """One action: a meeting, a collective, an error, an end, or a number of seconds of sleep."""
    if action == "meet":
        ranks.meet()
    elif action == "sum":
        ranks.largest(1)
    elif action == "fail":
        raise ValueError("a disk that cannot be read")
    elif action == "agreed":
        raise InterruptedRun("stopped", 75)
    elif action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    else:
        time.sleep(float(action))


def as_rank(actions: Sequence[str]) -> None:
    """One rank: its words of ``actions``, and what the command line would say at the end."""
    watch_module.BEAT_SECONDS, watch_module.LOST_SECONDS = 0.1, 1.0
    watch_module.SILENT_SECONDS, watch_module.LEAVE_SECONDS = SILENT_SECONDS, 3.0
    try:
        with join("cpu", TIMEOUT) as ranks:
            for action in actions[ranks.rank].split():
                act(ranks, action)
    except InterruptedRun as error:
        sys.exit(error.exit_code)
    except LeftBehindError as error:
        if str(error):
            print(f"error: {error}", flush=True)
        os._exit(error.exit_code)
    except ValueError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
