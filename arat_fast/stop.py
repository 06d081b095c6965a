"""Ctrl-C, SIGTERM and SIGUSR1 end a run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
if hasattr(signal, "SIGUSR1"):
    # What Slurm sends before the end of a job's time, if asked to.
    EXIT_CODES[signal.SIGUSR1] = 75
"""Exit code by signal; 75 is EX_TEMPFAIL: start the same command again to go on."""


class InterruptedRun(Exception):
    """The run was asked to stop, and its state is saved.

    Attributes:
        exit_code: for the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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

    Outside the main thread no handler can be set, and the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    before = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
