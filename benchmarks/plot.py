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
    """Images/s and memory of ``benchmarks.step`` as PNG: bars for one batch size, else lines.

    Args:
        record: of the bench.
        file: where the picture goes.
    """
    measured = [entry for entry in record["results"] if entry["status"] == "measured"]
    sizes = {entry["batch_size"] for entry in measured}
    settings = record["settings"]
    size = f", batch {sizes.pop()}" if len(sizes) == 1 else ""
    title = (
        f"{settings['model']}, PGD-{settings['num_steps']}, {settings['image_size']}×"
        f"{settings['image_size']}{size}\n{record['machine']['device']}"
    )
    with plot_style():
        if size:
            figure = Figure(figsize=(7.6, 1.3 + 0.34 * len(measured)), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
            _bars(left, right, measured)
        else:
            points = [{"axis": "", "value": entry["batch_size"], **entry} for entry in measured]
            figure = _lines(points, {"": "batch size"})
        _save(figure, title, file)


def plot_scaling(record: dict[str, Any], file: BinaryIO) -> None:
    """Images/s (above) and memory (below) of ``benchmarks.scaling`` as PNG, a column for each axis.

    Args:
        record: of the bench.
        file: where the picture goes.
    """
    base = record["settings"]["base"]
    title = (
        f"{base['model']} from batch {base['batch_size']}, {base['image_size']}×"
        f"{base['image_size']}, PGD-{base['num_steps']}\n{record['machine']['device']}"
    )
    measured = [entry for entry in record["results"] if entry["status"] == "measured"]
    with plot_style():
        _save(_lines(measured, record["settings"]["axes"]), title, file)


def _save(figure: Figure, title: str, file: BinaryIO) -> None:
    figure.suptitle(title, fontsize=10, color=INK)
    figure.savefig(file, format="png", dpi=DPI)


def _lines(measured: list[dict[str, Any]], labels: dict[str, str]) -> Figure:
    """Speed above and memory below, a column for each axis that has points."""
    columns = [axis for axis in labels if any(entry["axis"] == axis for entry in measured)]
    figure = Figure(figsize=(max(5.0, 1 + 2.75 * len(columns)), 5.4), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    names = list(dict.fromkeys(entry["contestant"] for entry in measured))
    scale, unit = _memory_unit(measured)
    for column, axis in enumerate(columns):
        here = [entry for entry in measured if entry["axis"] == axis]
        values = sorted({entry["value"] for entry in here})
        for axes, field, divisor, label in (
            (grid[0][column], "images_per_second", 1, "images/s"),
            (grid[1][column], "peak_memory_bytes", scale, f"peak memory, {unit}"),
        ):
            for name in names:
                points = [(e["value"], e[field]) for e in here if e["contestant"] == name]
                colour, style = LOOK.get(name, (GREY, 0))
                axes.plot(
                    [value for value, found in points if found],
                    [found / divisor for _, found in points if found],
                    label=name,
                    color=colour,
                    linestyle=DASHES[style],
                    marker=MARKERS[style],
                    markersize=4,
                )
            axes.set_xscale("log", base=2)
            small = 7 if len(values) > 5 else None
            axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=small)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            if not column:
                axes.set_ylabel(label)
        grid[1][column].set_xlabel(labels[axis])
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=min(4, len(names))
    )
    return figure


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
