"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end a command: a training at its next step, with a
checkpoint, everything else at once."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PARENT = "ARAT_FAST_PARENT"
"""The variable that names the process with which ``python -m arat_fast`` ends."""
_PR_SET_PDEATHSIG = 1
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGUSR1"):
    # What Slurm sends before the end of a job's time, if asked to; and a terminal that is lost.
    EXIT_CODES |= {signal.SIGUSR1: 75, signal.SIGHUP: 75}
"""Exit code by signal; 75 is EX_TEMPFAIL: start the same command again to go on."""


class InterruptedRun(Exception):
    """The run was asked to stop, and its state is saved.

    Attributes:
        exit_code: for the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """Another signal than Ctrl-C's came, and is treated alike.

    Attributes:
        exit_code: for the process.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = EXIT_CODES[signal.Signals(number)]


class EvaluationStopped(Exception):
    """A signal came in the middle of an evaluation, whose results are lost."""


class StopRequest:
    """Which signal asked the run to stop; None as long as none did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.signal] if self.signal is not None else 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first of the signals into a request; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread no handler can be set, and the request never comes. One that came too
    late for what was running is the earlier handler's.
    """
    request = StopRequest()

    def handle(number: int) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    with _handling(handle):
        yield request
    if request.signal is not None and callable(signal.getsignal(request.signal)):
        signal.raise_signal(request.signal)


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Have every signal end what is running, as Ctrl-C does.

    Raises:
        Terminated: one came; from wherever the main thread is. Not again while it ends.
    """
    ending = False

    def handle(number: int) -> None:
        nonlocal ending
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not ending:
            ending = True
            raise Terminated(number)

    with _handling(handle):
        yield


@contextmanager
def _handling(handle: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        leave_lost_output()
        handle(number)

    before = {}
    try:
        for number in EXIT_CODES:
            # nohup's wish, or a shell's.
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_with_parent() -> None:
    """Have this process get SIGTERM when the one that started it ends, killed or not (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_lost_output() -> None:
    """Output to a terminal that is gone, or that nobody reads any more, would be an error; it goes
    nowhere instead."""
    watched = select.poll()
    for descriptor in (1, 2):
        watched.register(descriptor, 0)
    for descriptor, found in watched.poll(0):
        if found & (select.POLLERR | select.POLLHUP):
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
