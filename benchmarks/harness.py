"""What every benchmark does: options, contestants that take turns, a record that grows on disk."""

from __future__ import annotations

import datetime
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import tyro

from arat_fast.device import describe_device, resolve_device
from arat_fast.display import Display
from arat_fast.files import write_json, write_text
from arat_fast.settings import Count, check_settings
from benchmarks.machine import describe_machine, rates
from benchmarks.measure import failure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark takes."""

    rounds: Count = 3
    """Turns of each contestant, of which the median counts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """File for the record; default in benchmarks/results/, named by device and date. The table lies
    beside it."""

    def __post_init__(self) -> None:
        check_settings("--", self)
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"--out expects a file, got the folder {self.out}")


Chosen = TypeVar("Chosen", bound=Options)


def unused(folder: Path, stem: str) -> Path:
    """``stem.json`` in ``folder``, made if need be, or ``stem-2.json`` …: not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path


class Bench(Generic[Chosen]):
    """One benchmark in progress.

    Args:
        kind: name of the benchmark, in file names.
        options: what was asked for.
        table: makes the Markdown of the record, complete or not.
        display: of the progress.

    Attributes:
        device: that is measured.
        record: "kind", "date", "seconds", "machine", "settings", "results" and "problems"; the
            benchmark adds to it.
        path: of the record.
    """

    def __init__(
        self,
        kind: str,
        options: Chosen,
        table: Callable[[Record], str],
        display: Display | None = None,
    ) -> None:
        self.options = options
        self.table = table
        self.display = display or Display()
        self.device = resolve_device(options.device)
        if self.device.index is not None:
            # Streams and events are those of the current one.
            torch.cuda.set_device(self.device)
        now = datetime.datetime.now(datetime.timezone.utc)
        self._started = time.monotonic()
        name = re.sub(r"\W+", "-", describe_device(self.device)).strip("-").lower()
        if options.out is None:
            self.path = unused(RESULTS, f"{kind}_{name}_{now:%Y%m%d-%H%M%S}")
        else:
            self.path = options.out
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.record: Record = {
            "kind": kind,
            "date": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": describe_machine(self.device),
            "settings": {},
            "results": [],
            "problems": [],
        }

    def measure_rates(self) -> None:
        """Add copy bandwidth and matrix product of this run to the record, as "rates"."""
        self.say("copy bandwidth and matrix product of this run")
        self.record["rates"] = rates(self.device)

    def say(self, text: str) -> None:
        """One line of progress."""
        self.display.say(f"  {text}")

    def problem(self, text: str) -> None:
        """Something that makes the exit status 1."""
        self.record["problems"].append(text)
        self.say(text)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Note an error inside the context: one measurement must not cost the others."""
        try:
            yield
        except Exception as error:
            self.problem(f"{what}: {failure(error)['reason']}")

    def save(self) -> None:
        """Write the record as it is, so that a run which is cut off keeps what it has measured."""
        self.record["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self.path, self.record)
        write_text(self.path.with_suffix(".md"), self.table(self.record))

    def finish(self) -> int:
        """Write everything, print the table; the exit status, 1 where there is a problem."""
        self.save()
        print(self.table(self.record))
        print(f"record: {self.path}")
        return int(bool(self.record["problems"]))


def alternate(
    calls: Mapping[str, Callable[[], float]],
    rounds: int,
    show: Callable[[str, int, float], None] = lambda name, done, value: None,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """The values of all ``calls``, which take turns: each runs once in every round.

    Args:
        calls: by name; each returns a number.
        rounds: turns of each, >= 1.
        show: told the name, the number of its turns so far, and the value.

    Returns:
        The values of each in the order of the rounds; and :func:`failure` of each call that raised
        an error, which takes no further turn and has no values.
    """
    failures: dict[str, dict[str, Any]] = {}
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in failures:
                continue
            try:
                values[name].append(call())
            except Exception as error:
                del values[name]
                failures[name] = failure(error)
            else:
                show(name, len(values[name]), values[name][-1])
    return values, failures


def spread(values: list[float]) -> float:
    """Distance between the largest and the smallest value, as a share of the median."""
    return (max(values) - min(values)) / statistics.median(values)


def command(options: type[Chosen], run: Callable[[Chosen], int], name: str) -> int:
    """Run a benchmark with the options of the command line.

    Returns:
        What ``run`` returns; 2, with one line on standard error, for what cannot be met.

    Raises:
        SystemExit: from tyro, also with status 2, for options that are unknown or out of range.
    """
    try:
        return run(tyro.cli(options, prog=f"python -m benchmarks.{name}"))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
