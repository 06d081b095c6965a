"""Plots of the bench, in the look of the reports."""

from __future__ import annotations

from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from arat_fast.report.style import (
    BLUE,
    DASHES,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    plot_style,
)

LOOK = {
    "naive": (GREY, 0),
    "tuned": (ORANGE, 1),
    "compiled": (PURPLE, 3),
    "compiled-graphs": (PURPLE, 5),
    "compiled-autotune": (PURPLE, 4),
    "official": (INK, 5),
    "fast-eager": (SKY, 4),
    "fast": (BLUE, 1),
    "fast-folded": (VERMILLION, 2),
}
"""Colour of each contestant, and which of the dashes and markers."""
DPI = 160


def plot_step(record: dict[str, Any], file: BinaryIO) -> None:
    """Images/s and memory of ``bench step`` as PNG: against the batch size, or as bars for one.

    Args:
        record: of the bench.
        file: where the picture goes.
    """
    measured = [entry for entry in record["results"] if entry["status"] == "measured"]
    sizes = sorted({entry["batch_size"] for entry in measured})
    with plot_style():
        names = list(dict.fromkeys(entry["contestant"] for entry in measured))
        if len(sizes) == 1:
            figure = Figure(figsize=(7.6, 1.3 + 0.34 * len(names)), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
            _bars(left, right, measured)
        else:
            figure = Figure(figsize=(8.2, 4.0), layout="constrained")
            left, right = figure.subplots(1, 2)
            scale, unit = _memory_unit(measured)
            for axes, field, divisor in (
                (left, "images_per_second", 1),
                (right, "peak_memory_bytes", scale),
            ):
                for name in names:
                    points = [e for e in measured if e["contestant"] == name]
                    _line(axes, name, points, "batch_size", field, divisor)
                _powers(axes, sizes)
                axes.set_xlabel("batch size")
            _units(left, right, unit)
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=4)
        settings = record["settings"]
        size = f", batch {sizes[0]}" if len(sizes) == 1 else ""
        figure.suptitle(
            f"{settings['model']}, PGD-{settings['num_steps']}, {settings['image_size']}×"
            f"{settings['image_size']}{size}\n{record['machine']['device']}",
            fontsize=10,
            color=INK,
        )
        figure.savefig(file, format="png", dpi=DPI)


def plot_scaling(record: dict[str, Any], file: BinaryIO) -> None:
    """Images/s (above) and memory (below) of ``bench scaling`` as PNG, a column for each axis.

    Args:
        record: of the bench.
        file: where the picture goes.
    """
    measured = [entry for entry in record["results"] if entry["status"] == "measured"]
    axes_names = [a for a in record["settings"]["axes"] if any(e["axis"] == a for e in measured)]
    with plot_style():
        figure = Figure(figsize=(1 + 2.75 * len(axes_names), 5.4), layout="constrained")
        grid = figure.subplots(2, len(axes_names), squeeze=False, sharex="col")
        names = list(dict.fromkeys(entry["contestant"] for entry in measured))
        scale, unit = _memory_unit(measured)
        for column, axis in enumerate(axes_names):
            above, below = grid[0][column], grid[1][column]
            here = [entry for entry in measured if entry["axis"] == axis]
            values = sorted({entry["value"] for entry in here})
            for axes, field, divisor in (
                (above, "images_per_second", 1),
                (below, "peak_memory_bytes", scale),
            ):
                for name in names:
                    points = [entry for entry in here if entry["contestant"] == name]
                    _line(axes, name, points, "value", field, divisor)
                _powers(axes, values)
            below.set_xlabel(record["settings"]["axes"][axis])
            _units(above, below, unit, logarithmic=True)
            if column:
                above.set_ylabel("")
                below.set_ylabel("")
        base = record["settings"]["base"]
        figure.legend(
            *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=len(names)
        )
        figure.suptitle(
            f"{base['model']} from batch {base['batch_size']}, {base['image_size']}×"
            f"{base['image_size']}, PGD-{base['num_steps']}\n{record['machine']['device']}",
            fontsize=10,
            color=INK,
        )
        figure.savefig(file, format="png", dpi=DPI)


def _bars(left: Axes, right: Axes, measured: list[dict[str, Any]]) -> None:
    measured = measured[::-1]
    rows = list(range(len(measured)))
    colours = [LOOK.get(entry["contestant"], (GREY, 0))[0] for entry in measured]
    speeds = [entry["images_per_second"] for entry in measured]
    turns = [[e["batch_size"] / t for t in e["round_seconds_per_step"]] for e in measured]
    below = [speed - min(rates) for speed, rates in zip(speeds, turns, strict=True)]
    above = [max(rates) - speed for speed, rates in zip(speeds, turns, strict=True)]
    scale, unit = _memory_unit(measured)
    memories = [(entry["peak_memory_bytes"] or 0) / scale for entry in measured]
    for axes, values, ends, label in (
        (left, speeds, [max(rates) for rates in turns], "images/s"),
        (right, memories, memories, f"peak memory, {unit}"),
    ):
        axes.barh(rows, values, color=colours, height=0.62)
        for row, value, end in zip(rows, values, ends, strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(
                text,
                (end, row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=8.5,
            )
        axes.set_xlim(0, 1.17 * max(ends) or 1)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    left.set_yticks(rows, [entry["contestant"] for entry in measured])
    left.errorbar(
        speeds, rows, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2.5
    )


def _memory_unit(measured: list[dict[str, Any]]) -> tuple[int, str]:
    most = max((entry["peak_memory_bytes"] or 0 for entry in measured), default=0)
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def _line(
    axes: Axes,
    name: str,
    points: list[dict[str, Any]],
    x_field: str,
    y_field: str,
    scale: int,
) -> None:
    points = sorted((p for p in points if (p[y_field] or 0) > 0), key=lambda p: p[x_field])
    colour, style = LOOK.get(name, (GREY, 0))
    axes.plot(
        [p[x_field] for p in points],
        [p[y_field] / scale for p in points],
        label=name,
        color=colour,
        linestyle=DASHES[style],
        marker=MARKERS[style],
        markersize=4,
    )


def _powers(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    crowded = len(values) > 5
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7 if crowded else None)
    axes.xaxis.set_minor_locator(NullLocator())


def _units(speed: Axes, memory: Axes, unit: str, logarithmic: bool = False) -> None:
    speed.set_ylabel("images/s")
    memory.set_ylabel(f"peak memory, {unit}")
    for axes in (speed, memory):
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
