"""Means over the seeds of a comparison, from its record alone, and the words beside them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arat_fast.compare.plan import Plan, PlannedMethod, other_folder, plan_from_record
from arat_fast.config import Config, check_same_run, config_from_dict, config_to_dict
from arat_fast.files import read_json
from arat_fast.objectives import known_objective
from arat_fast.settings import shown
from arat_fast.statistics import paired_interval, unpack

SUM = "sum"
ALL_PARTS = "all (ARAT)"


@dataclass(frozen=True)
class Spread:
    """A quantity in percent, one value for each seed that measured it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Row:
    """What was found of one method.

    Attributes:
        method: with its epochs and its cost.
        spreads: by metric ("clean", "pgd20", "autoattack", "sum"); a metric that no seed measured
            is absent.
        num_seeds: finished runs.
        train_seconds: mean training time, None before the first run.
    """

    method: PlannedMethod
    spreads: Mapping[str, Spread]
    num_seeds: int
    train_seconds: float | None


@dataclass(frozen=True)
class Difference:
    """Of two accuracies on the same images, in percent, with its paired 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


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

    @property
    def groups(self) -> dict[str, list[tuple[str, Row]]]:
        """Rows with their titles by table, "Method" and "Ablation"; one without rows is absent."""
        ablation = [(row.method.title, row) for row in self.rows if row.method.ablation]
        if ablation:
            ablation += [(ALL_PARTS, row) for row in self.rows if row.method.label == "arat"]
        methods = [(row.method.title, row) for row in self.rows if not row.method.ablation]
        return {k: v for k, v in (("Method", methods), ("Ablation", ablation)) if v}

    @property
    def reference(self) -> Row:
        """The row that :attr:`differences` are of: the recipe's own objective, else the first."""
        own = self.plan.config.objective.name
        return next((row for row in self.rows if row.method.label == own), self.rows[0])

    @property
    def differences(self) -> list[tuple[str, dict[str, Difference]]]:
        """The accuracy of :attr:`reference` less that of each other row, by title and metric: means
        over the seeds that both have, where their records say which images were right."""
        found = []
        for row in self.rows:
            if row is not self.reference:
                pairs = {name: self._difference(row, name) for name in self.metrics}
                found.append((row.method.title, {n: d for n, d in pairs.items() if d}))
        return [(title, pairs) for title, pairs in found if pairs]

    def _difference(self, other: Row, metric: str) -> Difference | None:
        first, second = (self._right(row, metric) for row in (self.reference, other))
        seeds = first.keys() & second.keys()
        if not seeds:
            return None
        a, b = (np.stack([right[seed] for seed in seeds]) for right in (first, second))
        low, high = paired_interval(a, b)
        return Difference(100 * float(a.mean() - b.mean()), 100 * low, 100 * high)

    def _right(self, row: Row, metric: str) -> dict[int, NDArray[np.bool_]]:
        """Which images were right, by seed."""
        return {
            cell["seed"]: unpack(cell["right"][metric], cell["accuracy"][metric]["num_samples"])
            for cell in self.record["cells"]
            if cell["label"] == row.method.label and metric in cell.get("right", {})
        }

    @property
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
    plan = plan_from_record(record)
    rows = tuple(_row(method, record["cells"]) for method in plan.methods)
    found = {name for row in rows for name in row.spreads}
    pgd = sorted(name for name in found if name.startswith("pgd"))
    order = ["clean", *pgd, "autoattack", SUM]
    return Results(plan, rows, tuple(n for n in order if n in found), record)


def _row(method: PlannedMethod, cells: Sequence[Mapping[str, Any]]) -> Row:
    own = [c for c in cells if c["label"] == method.label and c["status"] == "finished"]
    found = [percentages(cell) for cell in own]
    return Row(
        method,
        {
            name: Spread(tuple(cell[name] for cell in found if name in cell))
            for name in dict.fromkeys(itertools.chain(*found))
        },
        len(own),
        statistics.fmean(train_seconds(cell) for cell in own) if own else None,
    )


def percentages(cell: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of a finished run by metric, and the sum of clean and AutoAttack."""
    percent = {
        name: 100 * entry["correct"] / entry["num_samples"]
        for name, entry in cell["accuracy"].items()
    }
    if "clean" in percent and "autoattack" in percent:
        percent[SUM] = percent["clean"] + percent["autoattack"]
    return percent


def train_seconds(cell: Mapping[str, Any]) -> float:
    """Training time of a finished run, with that of the natural training that is part of it."""
    seconds = float(cell["wall_seconds"]["train"])
    natural = cell["natural_model"]
    # A teacher that was given is not counted in the cost either.
    if natural is None or cell["config"]["objective"].get("teacher") is not None:
        return seconds
    return seconds + float(natural["train_seconds"] or 0)


def read_cell(folder: Path, config: Config) -> dict[str, Any] | None:
    """What the summary of a finished run adds to the record; None where it is not finished.

    Args:
        folder: of the run.
        config: that it should have, but for what does not change the weights.

    Raises:
        ValueError: the run is finished and was trained with another configuration.
    """
    source = folder / "config.json"
    kept = (
        *("accuracy", "evaluation", "model", "wall_seconds", "device", "precision"),
        *("versions", "commit", "kernels", "num_parameters", "train_samples", "split"),
        "natural_model",
    )
    try:
        summary = read_json(folder / "summary.json")
        saved = config_from_dict(read_json(source)["config"])
        found = {name: summary[name] for name in kept}
    except (OSError, ValueError, KeyError):
        return None
    if summary["status"] != "finished":
        return None
    if "right" in summary:
        found["right"] = summary["right"]
    with other_folder():
        check_same_run(config, saved, source)
    return found


def column_name(metric: str) -> str:
    """Heading of a metric's column."""
    names = {"clean": "Clean", "autoattack": "AutoAttack", SUM: "Clean + AutoAttack"}
    return names.get(metric, metric.upper().replace("PGD", "PGD-"))


def conditions(results: Results) -> str:
    """What the numbers are, and with which settings they came about."""
    config, seeds = results.plan.config, results.plan.seeds
    n = results.num_samples
    first = "the first " if config.eval.max_samples else ""
    images = f"{first}{n:,} test images" if n else "the test images"
    over = ", mean ± standard deviation over seeds" if len(seeds) > 1 else " over seed"
    return (
        f"Accuracy in percent on {images} of {config.data.name}, {config.model.name}, "
        f"{config.attack.norm.replace('inf', '∞')} radius {shown(config.attack.eps)}{over} "
        f"{', '.join(map(str, seeds))}. All methods run with the "
        "recipe's optimiser, schedule and augmentation, whatever their papers used, unless a note "
        "names others."
    )


def cost_note(results: Results) -> str:
    """What the columns of the cost mean."""
    equal = "the epochs are the same"
    if results.plan.budget == "work":
        equal = "all that attack have about the same"
    return (
        "Cost: epochs × forward passes of the network per image, counted from the convolutions and "
        f"matrix products of one step, and those of natural training before it; {equal}, unless a "
        "method sets its own."
    )


def notes(results: Results) -> list[str]:
    """What a reader has to know beside the numbers: settings of single methods, how far one is the
    published one, failed, missing and unequal runs."""
    cells = results.record["cells"]
    found = [note for row in results.rows for note in _notes_on(row.method, results)]
    found += [f"{c['run']} failed: {c['reason']}." for c in cells if c["status"] == "failed"]
    missing = sum(cell["status"] == "pending" for cell in cells)
    if missing:
        found.append(f"{missing} of {len(cells)} runs are not finished.")
    finished = [cell for cell in cells if cell["status"] == "finished"]
    for name in ("device", "precision", "commit"):
        values = {str(cell[name]) for cell in finished}
        if len(values) > 1:
            found.append(f"the runs differ in {name}: {'; '.join(sorted(values))}.")
    # What one record does not name is no difference.
    named = [set(cell["versions"]) for cell in finished]
    shared = sorted(set.intersection(*named)) if named else []
    if len({str([cell["versions"][name] for name in shared]) for cell in finished}) > 1:
        found.append("the runs differ in the versions of what computed them.")
    return found


def _notes_on(method: PlannedMethod, results: Results) -> list[str]:
    cells = [c for c in results.record["cells"] if c["label"] == method.label and "config" in c]
    if not cells:
        return []
    config, plain = cells[0]["config"], results.plan.config
    name = config["objective"]["name"]
    # The module of an objective of one's own may not be at hand.
    known = known_objective(name)
    if known is not None:
        plain = plain.with_objective(name)
    settings = ", ".join(_own_settings(config, config_to_dict(plain), method.ablation))
    own = f"{method.title} has settings of its own: {settings}." if settings else ""
    return [note for note in (own, known.note if known is not None else "") if note]


def _own_settings(config: Mapping[str, Any], plain: Mapping[str, Any], ablation: bool) -> list[str]:
    """What a method sets beside what its title and the column of the cost say."""
    said = {("objective", "name"), ("train", "epochs")}
    if ablation:
        said |= {("objective", "stop_gradient"), ("objective", "predictor"), ("model", "norm")}
    return [
        f"{section}.{name}={value}"
        for section, values in config.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
        if (section, name) not in said and value != plain.get(section, {}).get(name, value)
    ]
