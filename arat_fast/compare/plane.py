"""The robustness-accuracy plane of a comparison."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arat_fast.compare.results import Results, Row, Spread, column_name
from arat_fast.report import style

_FAR = 1.5


@dataclass(frozen=True)
class _Point:
    row: Row
    color: str
    marker: str
    robust: Spread
    clean: Spread

    @property
    def centre(self) -> tuple[float, float]:
        return self.robust.mean, self.clean.mean

    @property
    def spread(self) -> tuple[float, float]:
        return self.robust.std or 0.0, self.clean.std or 0.0

    @property
    def mark(self) -> dict[str, Any]:
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": 8,
            "markerfacecolor": "white" if self.row.method.ablation else self.color,
            "markeredgewidth": 1.5,
        }

    @property
    def name(self) -> str:
        """The row's title; one of the ablation says what it adds to."""
        title = self.row.method.title
        return style.plot_text(f"naive {title}" if title.startswith("+") else title, 32)


def plane(results: Results) -> Figure | None:
    """Clean accuracy over robust accuracy, every seed and the means, with lines of equal sum.

    Rows far to the left of the others, as ordinary training is, are numbers in the legend instead
    of squeezing the rest. Robust is AutoAttack where it was run, PGD else.

    Args:
        results: of the comparison.

    Returns:
        The figure; None where no row has both accuracies.
    """
    metric = robust_metric(results)
    if metric is None:
        return None
    points = _points(results, metric)
    near = _near(points)
    with style.plot_style():
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(f"{column_name(metric)} accuracy, %")
        axes.set_ylabel("clean accuracy, %")
        for point in near:
            _draw(axes, point)
        _limits(axes, near)
        _equal_sums(axes)
        for point in points:
            x, y = point.centre
            missing = f", not shown:\nclean {y:.1f}, robust {x:.1f}"
            label = point.name + ("" if point in near else missing)
            axes.plot([], [], **point.mark, linestyle="", label=label)
        figure.legend(loc="outside right upper", labelspacing=0.9)
    return figure


def robust_metric(results: Results) -> str | None:
    """The accuracy that the plane has as robust: AutoAttack where it was run, PGD else."""
    pgd = [metric for metric in results.metrics if metric.startswith("pgd")]
    for metric in ("autoattack", *pgd):
        if _points(results, metric):
            return metric
    return None


def describe_plane(results: Results) -> str:
    """The plane in words, for those who cannot see it."""
    metric = robust_metric(results) or ""
    described = [
        f"{point.row.method.title} clean {point.clean.mean:.1f}, robust {point.robust.mean:.1f}"
        for point in _points(results, metric)
    ]
    return f"Clean over {column_name(metric)} accuracy in percent: {'; '.join(described)}."


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _points(results: Results, metric: str) -> list[_Point]:
    points = []
    for index, row in enumerate(results.rows):
        clean, robust = row.spreads.get("clean"), row.spreads.get(metric)
        # A seed that measured only one of them has no point.
        if clean is None or robust is None or len(clean.values) != len(robust.values):
            continue
        points.append(_Point(row, style.color(index), style.marker(index), robust, clean))
    return points


def _near(points: Sequence[_Point]) -> list[_Point]:
    """The points without those so far to the left that they would squeeze the picture."""
    ordered = sorted(points, key=lambda point: point.centre[0])
    for index in range(1, len(ordered) - 1):
        gap = ordered[index].centre[0] - ordered[index - 1].centre[0]
        width = ordered[-1].centre[0] - ordered[index].centre[0]
        if gap > _FAR * max(width, 2.0) and len(ordered) - index > index:
            return ordered[index:]
    return ordered


def _draw(axes: Axes, point: _Point) -> None:
    seeds: dict[str, Any] = {"linestyle": "", "color": point.color, "alpha": 0.45, "zorder": 3}
    small: dict[str, Any] = {"marker": point.marker, "markersize": 3.2, "markeredgewidth": 0}
    axes.plot(point.robust.values, point.clean.values, **seeds, **small)
    # No bar of length 0 where there is one seed.
    x, y = point.robust, point.clean
    bars: dict[str, Any] = {"linewidth": 1.0, "linestyle": "", "capsize": 2.5, "zorder": 4}
    axes.errorbar([x.mean], [y.mean], xerr=x.std or None, yerr=y.std or None, **point.mark, **bars)


def _limits(axes: Axes, points: Sequence[_Point]) -> None:
    """Room around the marks, hardly beyond 0 and 100, and at least a point of accuracy."""
    centres = np.array([point.centre for point in points])
    spreads = np.array([point.spread for point in points])
    seeds = np.hstack([(p.robust.values, p.clean.values) for p in points]).T
    marks = np.vstack([centres - spreads, centres + spreads, seeds])
    lows, highs = marks.min(0), marks.max(0)
    margins = np.maximum(0.1 * (highs - lows), 0.5)
    edges = np.minimum(margins / 4, 2.0)
    left, bottom = np.maximum(lows - margins, -edges)
    right, top = np.minimum(highs + margins, 100 + edges)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        # No mark outside of 0 to 100, though the margin may reach over it.
        axis.set_major_formatter(lambda value, _: f"{value:g}" if 0 <= value <= 100 else "")


def _equal_sums(axes: Axes) -> None:
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    totals = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(x_low + y_low, x_high + y_high)
    for total in totals:
        start, end = max(x_low, total - y_high), min(x_high, total - y_low)
        if end - start < 0.08 * (x_high - x_low):
            continue
        axes.axline((end, total - end), slope=-1, color=style.LINE, dashes=(4, 3), lw=1, zorder=1)
        # Written at the lower end of the line, inside the axes.
        axes.annotate(
            f"sum {total:g}",
            (end, total - end),
            xytext=(-3, 3),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="bottom",
            fontsize=7,
            color=style.GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            zorder=2,
        )
