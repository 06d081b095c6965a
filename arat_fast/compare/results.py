"""Means over the seeds of a comparison, from its record alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arat_fast.compare.plan import Plan, PlannedMethod, plan_from_record
from arat_fast.config import Config, check_same_run, config_from_dict

SUM = "sum"


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds that measured it, in percent.

    Attributes:
        values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """What was found of one method.

    Attributes:
        planned: the method, its epochs and its cost.
        spreads: by metric ("clean", "pgd20", "autoattack", "sum"); a metric that no seed measured
            is absent.
        num_seeds: finished runs.
        weights: which weights were evaluated ("last", "swa", "ema"), None before the first run.
        train_seconds: mean training time, None before the first run.
    """

    planned: PlannedMethod
    spreads: Mapping[str, Spread]
    num_seeds: int
    weights: str | None
    train_seconds: float | None

    @property
    def title(self) -> str:
        return self.planned.method.title


@dataclass(frozen=True)
class Results:
    """A comparison, evaluated.

    Attributes:
        plan: what was run.
        rows: one per method.
        metrics: keys of the spreads that any row has, in the order of the columns.
        record: the whole content of comparison.json.
    """

    plan: Plan
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    record: Mapping[str, Any]

    def num_samples(self) -> int | None:
        """Test images of the evaluations; None before the first, or where runs differ."""
        found = {
            entry["num_samples"]
            for cell in self.record["cells"]
            for entry in cell.get("accuracy", {}).values()
        }
        return found.pop() if len(found) == 1 else None


def evaluate_record(record: Mapping[str, Any]) -> Results:
    """Means and standard deviations of what a comparison.json holds.

    Raises:
        ValueError: the record is not one of this version.
    """
    plan = plan_from_record(dict(record))
    try:
        rows = tuple(_row(planned, record["cells"]) for planned in plan.methods)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a comparison of this version: {error} is missing") from error
    found = {name for row in rows for name in row.spreads}
    pgd = sorted(name for name in found if name.startswith("pgd"))
    order = ["clean", *pgd, "autoattack", SUM]
    return Results(plan, rows, tuple(n for n in order if n in found), record)


def _row(planned: PlannedMethod, cells: Sequence[Mapping[str, Any]]) -> Row:
    own = [c for c in cells if c["label"] == planned.method.label and c["status"] == "finished"]
    columns: dict[str, list[float]] = {}
    for cell in own:
        percent = {
            name: 100 * entry["correct"] / entry["num_samples"]
            for name, entry in cell["accuracy"].items()
        }
        if "clean" in percent and "autoattack" in percent:
            percent[SUM] = percent["clean"] + percent["autoattack"]
        for name, value in percent.items():
            columns.setdefault(name, []).append(value)
    seconds = [train_seconds(cell) for cell in own]
    weights = {str(cell["model"]) for cell in own}
    return Row(
        planned,
        {name: Spread(tuple(values)) for name, values in columns.items()},
        len(own),
        " and ".join(sorted(weights)) or None,
        statistics.fmean(seconds) if seconds else None,
    )


def train_seconds(cell: Mapping[str, Any]) -> float:
    """Training time of a finished run, with that of the natural training that is part of it."""
    seconds = float(cell["wall_seconds"]["train"])
    natural = cell["natural_model"]
    # A teacher that was given is not counted in the cost either.
    if natural is None or cell["config"]["objective"]["teacher"] is not None:
        return seconds
    return seconds + float(natural["train_seconds"] or 0)


def read_cell(folder: Path, config: Config) -> dict[str, Any] | None:
    """What the summary of a finished run adds to the record; None where it is not finished.

    Args:
        folder: of the run.
        config: that it should have; what does not change the weights may differ.

    Raises:
        ValueError: the run is finished and was trained with another configuration.
    """
    source = folder / "config.json"
    found: dict[str, Any] | None = None
    with suppress(OSError, ValueError, KeyError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] != "finished":
            return None
        kept = (
            *("accuracy", "evaluation", "model", "wall_seconds", "device", "precision"),
            *("versions", "commit", "kernels", "num_parameters", "train_samples", "split"),
            "natural_model",
        )
        saved = config_from_dict(json.loads(source.read_text(encoding="utf-8"))["config"])
        found = {name: summary[name] for name in kept}
    if found is not None:
        try:
            check_same_run(config, saved, source)
        except ValueError as error:
            raise ValueError(f"{error}; choose another folder with --out") from error
    return found
