"""A run beside others: what one method buys over another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from arat_fast.config import OWN_IMAGES
from arat_fast.data.fingerprint import class_order
from arat_fast.report import style
from arat_fast.report.curves import draw_series
from arat_fast.report.run import Run
from arat_fast.report.style import Plot
from arat_fast.report.words import (
    DASH,
    duration,
    interval,
    metric_name,
    objective_name,
    percent,
    plain,
    signed_points,
)
from arat_fast.statistics import difference_interval


class Cell(NamedTuple):
    """A number in a table, what stands below it, and the first run's difference from it."""

    value: str = DASH
    small: str = ""
    change: str = ""
    change_interval: str = ""


class Row(NamedTuple):
    """A run beside the first one.

    Attributes:
        letter: that it goes by.
        run: the run.
        cells: one for each heading.
        clear: headings of accuracies whose difference the choice of test images does not explain.
        mismatches: in what the runs differ besides the method, in words.
    """

    letter: str
    run: Run
    cells: list[Cell]
    clear: list[str]
    mismatches: list[str]

    @property
    def short(self) -> str:
        """Letter, method and seed."""
        return f"{self.letter} · {objective_name(self.run.config)}, seed {self.run.config.seed}"


class Comparison(NamedTuple):
    """Everything that the section on other runs shows.

    Attributes:
        headings: accuracies, their sum where AutoAttack was run, and training.
        rows: the run of the report first.
        plots: of all runs.
    """

    headings: list[str]
    rows: list[Row]
    plots: list[Plot]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs; every difference is the first run minus another.

    Args:
        runs: two or more.

    Raises:
        ValueError: two runs on one dataset have other classes.
    """
    # A dictionary for its order.
    names = dict.fromkeys(name for run in runs for name in run.summary.accuracy)
    metrics = [n for n in names if n in ("clean", "autoattack") or n.startswith("pgd")]
    metrics.sort(key=lambda n: (n != "clean", n == "autoattack", n))
    headings = [*map(metric_name, metrics), *(["Sum"] if "autoattack" in metrics else [])]
    rows = [_row(chr(ord("A") + i), run, runs[0], metrics) for i, run in enumerate(runs)]
    with style.plot_style():
        plots = [_trade_off(rows, metrics), _over_epochs(rows)]
    return Comparison([*headings, "Training"], rows, [plot for plot in plots if plot is not None])


def _sum(run: Run | None) -> float | None:
    """Clean plus AutoAttack accuracy, where both were measured."""
    final = run.summary.accuracy if run else {}
    if not {"clean", "autoattack"} <= final.keys():
        return None
    return final["clean"].value + final["autoattack"].value


def _typical_seconds(run: Run | None) -> float | None:
    """Of a training at its median speed, which a while of other work on the machine hardly moves;
    None where that is not known."""
    speeds = run.metrics.get("images_per_second") if run else None
    if run is None or speeds is None or not run.summary.train_samples or run.epochs is None:
        return None
    return run.epochs * run.summary.train_samples / float(np.nanmedian(speeds.values))


def _same_data(run: Run, other: Run) -> bool:
    """Whether both runs are of one dataset; images of one's own are known by where they lie."""
    ours, theirs = run.config.data, other.config.data
    return ours.name == theirs.name and (ours.name not in OWN_IMAGES or ours.root == theirs.root)


def _row(letter: str, run: Run, first: Run, metrics: Sequence[str]) -> Row:
    versus = first if run is not first and _same_data(first, run) else None
    cells, clear = [], []
    for key in metrics:
        accuracy = run.summary.accuracy.get(key)
        ours = versus.summary.accuracy.get(key) if versus else None
        if accuracy is None:
            cells.append(Cell())
            continue
        n = accuracy.num_samples
        cell = Cell(percent(accuracy.value, n), interval(*accuracy.interval, n))
        if ours is not None:
            low, high = difference_interval((ours.correct, accuracy.correct), (ours.num_samples, n))
            around = f"({signed_points(low)} to {signed_points(high)})"
            cell = cell._replace(
                change=signed_points(ours.value - accuracy.value), change_interval=around
            )
            if low > 0 or high < 0:
                clear.append(metric_name(key))
        cells.append(cell)
    if "autoattack" in metrics:
        total, our_total = _sum(run), _sum(versus)
        cell = Cell() if total is None else Cell(f"{100 * total:.1f}")
        if total is not None and our_total is not None:
            cell = cell._replace(change=signed_points(our_total - total))
        cells.append(cell)
    seconds = run.summary.wall_seconds.get("train")
    typical, our_typical = _typical_seconds(run), _typical_seconds(versus)
    change = f"×{our_typical / typical:.2g}" if our_typical and typical else ""
    device = run.summary.device or ""
    cells.append(Cell(duration(seconds), device, change) if seconds is not None else Cell())
    return Row(letter, run, cells, clear, _mismatches(first, run))


def _mismatches(first: Run, other: Run) -> list[str]:
    a, b = first.config, other.config
    pairs: list[tuple[str, Any, Any]] = [
        ("dataset", a.data.name, b.data.name),
        ("attack norm", a.attack.norm, b.attack.norm),
        ("eps", a.attack.eps, b.attack.eps),
        ("network", a.model.name, b.model.name),
        ("epochs", a.train.epochs, b.train.epochs),
        ("split", first.summary.split, other.summary.split),
        ("device", first.summary.device, other.summary.device),
    ]
    if a.data.name == b.data.name:
        if not _same_data(first, other):
            pairs.append(("images from", a.data.root, b.data.root))
        names, others = first.summary.classes, other.summary.classes
        if others and class_order(names, others, first.path) is not None:
            pairs.append(("order of the classes", names[0], others[0]))
    for key in first.summary.accuracy.keys() & other.summary.accuracy.keys():
        ours, theirs = (run.summary.accuracy[key].num_samples for run in (first, other))
        pairs.append((f"images for {metric_name(key)}", ours, theirs))
    return [
        f"{name} {plain(ours)} against {plain(theirs)}"
        for name, ours, theirs in pairs
        if ours != theirs and None not in (ours, theirs)
    ]


def _trade_off(rows: Sequence[Row], metrics: Sequence[str]) -> Plot | None:
    shown = [(i, row, row.run.summary.accuracy) for i, row in enumerate(rows)]
    shown = [entry for entry in shown if "clean" in entry[2]]
    # AutoAttack where every run has it.
    common = [k for k in metrics if k != "clean" and all(k in final for *_, final in shown)]
    if len(shown) < 2 or not common:
        return None
    key, name = common[-1], metric_name(common[-1])
    figure, axes = style.new_axes(height=3.6)
    described = []
    for index, row, final in shown:
        robust, clean = (final[k] for k in (key, "clean"))
        (x, xerr), (y, yerr) = (
            (100 * a.value, [[100 * (a.value - a.interval[0])], [100 * (a.interval[1] - a.value)]])
            for a in (robust, clean)
        )
        look: dict[str, Any] = {"color": style.color(index), "marker": style.marker(index)}
        look |= {"markersize": 8, "linewidth": 1.1, "capsize": 3}
        label = style.plot_text(row.short, 40)
        axes.errorbar([x], [y], xerr=xerr, yerr=yerr, label=label, **look)
        described.append(
            f"{row.short}: clean {percent(clean.value)}, {name} {percent(robust.value)}"
        )
    axes.set_xlabel(f"{name} accuracy, %")
    axes.set_ylabel("clean accuracy, %")
    style.within_percent(axes)
    style.legend_above(axes, 1)
    return Plot(
        "The trade-off",
        figure,
        f"Clean against robust accuracy. {'; '.join(described)}.",
        "Further up and further right is better. Whiskers are the 95\u202f% intervals.",
    )


def _over_epochs(rows: Sequence[Row]) -> Plot | None:
    """Evaluations that all runs have, or else the batches that they were trained on: never one
    beside the other."""
    tests = set.intersection(*({(e.split, e.num_steps) for e in r.run.evaluations} for r in rows))
    split, num_steps = min(tests, default=("", 0))
    drawn = [
        ("clean" if tests else "accuracy_clean", "clean", style.DASHES[1]),
        ("pgd", f"PGD-{num_steps}", "-") if tests else ("accuracy_adv", "attacked", "-"),
    ]
    figure, axes = style.new_axes(height=3.6)
    described: list[str] = []
    models: dict[str, None] = {}
    for index, (letter, run, *_) in enumerate(rows):
        lines = run.metrics
        if tests:
            # Evaluated most often; on a tie the weights that were evaluated at the end.
            found = {model: each for (of, model), each in run.evaluated().items() if of == split}
            model = max(found, key=lambda m: (len(found[m]["pgd"].epochs), m == run.summary.model))
            lines, models[model] = found[model], None
        for key, name, dashes in drawn:
            if key not in lines:
                continue
            # Dashes alone do not tell two single points apart.
            marker = style.marker(index) if tests or len(lines[key].values) == 1 else ""
            color = style.color(index)
            fill = "white" if name == "clean" else color
            label = f"{letter} {name}"
            draw_series(axes, lines[key], label, color, dashes, marker, markerfacecolor=fill)
            described.append(f"{label} ends at {percent(lines[key].values[-1])}")
    if not described:
        return None
    style.as_percent(axes)
    style.epoch_axis(axes)
    style.legend_above(axes, len(rows) if len(rows) <= 4 else 3)
    source = "Training batches, each under the attack of its own training."
    if tests:
        source = f"Evaluations during training: {split} images, {', '.join(models)} weights."
    return Plot(
        "Over the epochs",
        figure,
        f"Accuracy over epochs. {'; '.join(described)}.",
        f"Dashed, hollow marks: clean. Solid, full marks: under attack. {source}",
    )
