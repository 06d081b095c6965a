"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from arat_fast.stop import leave_lost_output

QUIET_SECONDS = 120.0
"""Shortest time between two lines of progress where the output is not a terminal: an epoch or an
attack that takes less has one line."""

Unit = Literal["images", "passes", "operations", "corruptions"]


def about(seconds: float) -> str:
    """A time in its largest unit: "0.35 s", "50 s", "40 min", "9 h", "12 days"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


class SuiteProgress(Protocol):
    """Told how far an evaluation of several parts is."""

    def __call__(
        self, name: str, done: int, total: int, unit: Unit = "images", note: str = ""
    ) -> None:
        """``done`` of ``total``; of an attack's forward passes of an image ``total`` is the most
        there can be.

        Args:
            name: what is running.
            done, total: >= 0.
            unit: what is counted.
            note: what else there is to say.
        """


class Display:
    """Progress of one run.

    Args:
        console: where to write; None for standard error, so that results can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.said: set[str] = set()

    def say(self, text: str) -> None:
        """Print one line, above a bar if there is one; nothing where nobody can read it."""
        leave_lost_output()
        self.console.print(text, markup=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        """Print a line that was not printed so before."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    @contextmanager
    def training(self, total_steps: int, done: int, kind: str) -> Iterator[TrainingBar]:
        """A bar over the steps of a run, at step ``done``, of an objective's training."""
        bar = TrainingBar(self, total_steps, done, kind)
        with bar.shown():
            yield bar

    @contextmanager
    def evaluating(self) -> Iterator[EvaluationBar]:
        """A line that tells which attack, or which check of the data, is running and how far it
        is."""
        bar = EvaluationBar(self)
        with bar.shown():
            yield bar


class _Bar:
    """Progress on a terminal; elsewhere a line now and then."""

    def __init__(self, display: Display, *columns: ProgressColumn, period: float = 30) -> None:
        self.say = display.say
        self.is_terminal = display.console.is_terminal
        self.name = ""
        self.spoke = time.monotonic()
        self.progress = Progress(
            *columns,
            TextColumn("{task.fields[status]}"),
            console=display.console,
            disable=not self.is_terminal,
            speed_estimate_period=period,
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        leave_lost_output()
        with self.progress:
            try:
                yield
            finally:
                leave_lost_output()

    def line(self, text: str, quiet: float = 0.0) -> None:
        """Print a line where there is no bar, unless one came less than ``quiet`` seconds ago."""
        now = time.monotonic()
        if not self.is_terminal and now - self.spoke >= quiet:
            self.spoke = now
            self.say(text)


class TrainingBar(_Bar):
    """Steps done, images/s, remaining time, loss, clean and robust accuracy of the batches.

    Where there is no bar, the remaining time is said from the second step on: the first may compile
    what the others run.
    """

    def __init__(self, display: Display, total_steps: int, done: int, kind: str) -> None:
        super().__init__(
            display,
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            period=300,
        )
        self.name = "training"
        self.total, self.done, self.kind = total_steps, done, kind
        self.first: tuple[float, int] | None = None
        self.task = self.progress.add_task("training", total=total_steps, completed=done, status="")

    def advance(self) -> None:
        """One step is done."""
        self.progress.advance(self.task)
        self.done += 1
        if self.first is None:
            self.first = time.monotonic(), self.done
            return
        quiet = 0.0 if self.done == self.first[1] + 1 else QUIET_SECONDS
        pace = f"step {self.done:,} of {self.total:,}, {about(self._step_seconds())} each"
        self.line(f"  {self.name}  {pace}{self._left()}", quiet)

    def go_to(self, step: int) -> None:
        """``step`` steps are done, fewer than before."""
        self.progress.update(self.task, completed=step)
        self.done, self.first = step, None

    def show(self, status: str, silent: bool = False) -> None:
        """Set the text beside the bar; where there is none, a line now and then unless silent."""
        self.progress.update(self.task, status=status)
        if not silent:
            self.line(f"  {self.name}  {status}{self._left()}", QUIET_SECONDS)

    def _step_seconds(self) -> float:
        """Of a step, as a mean over those after the first."""
        assert self.first is not None
        began, first = self.first
        return (time.monotonic() - began) / (self.done - first)

    def _left(self) -> str:
        if self.first is None or self.done in (self.first[1], self.total):
            return ""
        left = about(self._step_seconds() * (self.total - self.done))
        return f"  {left} of {self.kind} training left"

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Name the epoch that begins, counted from 1."""
        self.name = f"epoch {epoch}/{epochs}"
        self.progress.update(self.task, description=self.name)

    def end_epoch(self, epoch: int, epochs: int, status: str) -> None:
        """Print a line for the epoch that is done, where there is no bar."""
        self.line(f"epoch {epoch}/{epochs}  {status}{self._left()}")


class EvaluationBar(_Bar):
    """Callable as the ``progress`` argument of the evaluation functions."""

    def __init__(self, display: Display) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        super().__init__(display, *columns, BarColumn(bar_width=20))
        self.task: TaskID | None = None

    def __call__(
        self, name: str, done: int, total: int, unit: Unit = "images", note: str = ""
    ) -> None:
        """As :class:`SuiteProgress`."""
        status = f"{done} of {total} {unit}"
        if unit == "passes":
            status = f"{100 * done / max(total, 1):.0f} %, {note}"
        if name != self.name:
            self.name = name
            if self.task is not None:
                self.progress.update(self.task, total=1, completed=1)
            self.task = self.progress.add_task(name, total=total, status=status)
            self.line(f"{name}: {note if unit == 'passes' else f'{total} {unit}'}")
        elif self.task is not None:
            self.progress.update(self.task, completed=done, status=status)
            self.line(f"{name}: {status}", QUIET_SECONDS)
