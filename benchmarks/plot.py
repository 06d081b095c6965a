"""Plots of the bench, in the look of the reports."""

from __future__ import annotations

from typing import BinaryIO

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
from benchmarks.table import AXES, Record, rate, varied

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


def plot_step(record: Record, file: BinaryIO) -> None:
    """Images/s and memory of ``benchmarks.step`` as PNG: bars for one size, lines for several, a
    column for each size that varies.

    Args:
        record: of the bench.
        file: where the picture goes.
    """
    measured = [entry for entry in record["results"] if entry["status"] == "measured"]
    settings, axes = record["settings"], varied(measured)
    title = (
        f"{settings['model']}, batch {settings['batch_size']}, PGD-{settings['num_steps']}, "
        f"{settings['image_size']}×{settings['image_size']}\n{record['machine']['device']}"
    )
    with plot_style():
        if axes:
            figure = _lines(measured, axes, settings)
        else:
            figure = Figure(figsize=(7.6, 1.3 + 0.34 * len(measured)), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
            _bars(left, right, measured)
        figure.suptitle(title, fontsize=10, color=INK)
        figure.savefig(file, format="png", dpi=DPI)


def _lines(measured: list[Record], axes: list[str], base: Record) -> Figure:
    """Speed above and memory below, a column for each axis along which ``base`` is left."""
    figure = Figure(figsize=(max(5.0, 1 + 2.75 * len(axes)), 5.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    names = list(dict.fromkeys(entry["contestant"] for entry in measured))
    scale, unit = _memory_unit(measured)
    for column, axis in enumerate(axes):
        others = [other for other in AXES if other != axis]
        here = [e for e in measured if all(e[other] == base[other] for other in others)]
        values = sorted({entry[axis] for entry in here})
        for plane, field, divisor, label in (
            (grid[0][column], "images_per_second", 1, "images/s"),
            (grid[1][column], "peak_memory_bytes", scale, f"peak memory, {unit}"),
        ):
            for name in names:
                points = [(e[axis], e[field]) for e in here if e["contestant"] == name]
                colour, style = LOOK.get(name, (GREY, 0))
                plane.plot(
                    [value for value, found in points if found],
                    [found / divisor for _, found in points if found],
                    label=name,
                    color=colour,
                    linestyle=DASHES[style],
                    marker=MARKERS[style],
                    markersize=4,
                )
            plane.set_xscale("log", base=2)
            small = 7 if len(values) > 5 else None
            plane.set_xticks(values, [f"{value:g}" for value in values], fontsize=small)
            plane.xaxis.set_minor_locator(NullLocator())
            plane.set_yscale("log")
            plane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plane.yaxis.set_minor_locator(NullLocator())
            plane.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            if not column:
                plane.set_ylabel(label)
        grid[1][column].set_xlabel(AXES[axis])
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=min(4, len(names))
    )
    return figure


def _bars(left: Axes, right: Axes, measured: list[Record]) -> None:
    measured = measured[::-1]
    rows = list(range(len(measured)))
    colours = [LOOK.get(entry["contestant"], (GREY, 0))[0] for entry in measured]
    speeds = [entry["images_per_second"] for entry in measured]
    turns = [[e["batch_size"] / t for t in e["round_seconds_per_step"]] for e in measured]
    below = [speed - min(rates) for speed, rates in zip(speeds, turns, strict=True)]
    above = [max(rates) - speed for speed, rates in zip(speeds, turns, strict=True)]
    scale, unit = _memory_unit(measured)
    memories = [(entry["peak_memory_bytes"] or 0) / scale for entry in measured]
    for axes, values, errors, label in (
        (left, speeds, [below, above], "images/s"),
        (right, memories, None, f"peak memory, {unit}"),
    ):
        style = {"ecolor": INK, "elinewidth": 1, "capsize": 2.5}
        bars = axes.barh(rows, values, xerr=errors, color=colours, height=0.62, error_kw=style)
        axes.bar_label(bars, [rate(value) for value in values], padding=5, color=INK, fontsize=8.5)
        axes.margins(x=0.17)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    left.set_yticks(rows, [entry["contestant"] for entry in measured])


def _memory_unit(measured: list[Record]) -> tuple[int, str]:
    most = max((entry["peak_memory_bytes"] or 0 for entry in measured), default=0)
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
