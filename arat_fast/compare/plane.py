"""The robustness-accuracy plane of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arat_fast.compare.results import Results, Row, Spread, column_name
from arat_fast.report import style

_FAR = 1.5


class _Point(NamedTuple):
    row: Row
    robust: Spread
    clean: Spread
    look: dict[str, Any]

    @property
    def name(self) -> str:
        """The row's title; one of the ablation says what it adds to."""
        title = self.row.method.title
        return style.plot_text(f"naive {title}" if title.startswith("+") else title, 32)


def plane(results: Results) -> style.Plot | None:
    """Clean accuracy over robust accuracy, every seed and the means, with lines of equal sum.

    Rows far to the left of the others, as ordinary training is, are numbers in the legend instead
    of squeezing the rest. Robust is AutoAttack where it was run, PGD else.

    Args:
        results: of the comparison.

    Returns:
        The plot; None where no row has both accuracies.
    """
    pgd = [metric for metric in results.metrics if metric.startswith("pgd")]
    found = {metric: _points(results, metric) for metric in ("autoattack", *pgd)}
    metric = next((metric for metric, points in found.items() if points), None)
    if metric is None:
        return None
    points, robust = found[metric], column_name(metric)
    near = _near(points)
    with style.plot_style():
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(f"{robust} accuracy, %")
        axes.set_ylabel("clean accuracy, %")
        for point in near:
            _draw(axes, point)
        axes.margins(0.1)
        style.within_percent(axes)
        _equal_sums(axes)
        for point in points:
            numbers = f"clean {point.clean.mean:.1f}, robust {point.robust.mean:.1f}"
            label = point.name + ("" if point in near else f", not shown:\n{numbers}")
            axes.plot([], [], **point.look, linestyle="", label=label)
        figure.legend(loc="outside right upper", labelspacing=0.9)
        figure.legend(handles=_key(near), loc="outside right lower")
    described = [
        f"{point.row.method.title} clean {point.clean.mean:.1f}, robust {point.robust.mean:.1f}"
        for point in points
    ]
    return style.Plot(
        "Robustness and accuracy",
        figure,
        f"Clean over {robust} accuracy in percent: {'; '.join(described)}.",
        "Further up and further right is better.",
    )


def _points(results: Results, metric: str) -> list[_Point]:
    points = []
    for index, row in enumerate(results.rows):
        clean, robust = row.spreads.get("clean"), row.spreads.get(metric)
        # A seed that measured only one of them has no point.
        if clean is None or robust is None or len(clean.values) != len(robust.values):
            continue
        color = style.color(index)
        look = {"color": color, "marker": style.marker(index), "markersize": 8}
        look |= {"markerfacecolor": "white" if row.method.ablation else color}
        points.append(_Point(row, robust, clean, look | {"markeredgewidth": 1.5}))
    return points


def _near(points: Sequence[_Point]) -> list[_Point]:
    """The points without those so far to the left that they would squeeze the picture."""
    ordered = sorted(points, key=lambda point: point.robust.mean)
    for index in range(1, len(ordered) - 1):
        gap = ordered[index].robust.mean - ordered[index - 1].robust.mean
        width = ordered[-1].robust.mean - ordered[index].robust.mean
        if gap > _FAR * max(width, 2.0) and len(ordered) - index > index:
            return ordered[index:]
    return ordered


def _draw(axes: Axes, point: _Point) -> None:
    seeds: dict[str, Any] = {"linestyle": "", "alpha": 0.45, "zorder": 3, "markeredgewidth": 0}
    seeds |= {"color": point.look["color"], "marker": point.look["marker"], "markersize": 3.2}
    axes.plot(point.robust.values, point.clean.values, **seeds)
    # No bar of length 0 where there is one seed.
    x, y = point.robust, point.clean
    bars: dict[str, Any] = {"linewidth": 1.0, "linestyle": "", "capsize": 2.5, "zorder": 4}
    axes.errorbar([x.mean], [y.mean], xerr=x.std or None, yerr=y.std or None, **point.look, **bars)


def _key(points: Sequence[_Point]) -> list[Line2D]:
    """What marks and lines mean, whatever their colour and form."""
    mark = {"color": style.GREY, "marker": "o", "linestyle": ""}
    looks: dict[str, dict[str, Any]] = {
        "mean over the seeds, bars:\none standard deviation": mark | {"linestyle": "-"},
        "one seed": mark | {"markersize": 3.2, "alpha": 0.45},
        "same sum of the two": {"color": style.LINE, "linestyle": "--", "linewidth": 1},
    }
    if any(point.row.method.ablation for point in points):
        looks["hollow: parts of ARAT"] = mark | {"markerfacecolor": "white"}
    return [Line2D([], [], label=label, **look) for label, look in looks.items()]


def _equal_sums(axes: Axes) -> None:
    x, y = np.meshgrid(np.linspace(*axes.get_xlim()), np.linspace(*axes.get_ylim()))
    look: dict[str, Any] = {"colors": style.LINE, "linestyles": "--", "linewidths": 1}
    lines = axes.contour(x, y, x + y, levels=7, **look, zorder=1)
    axes.clabel(lines, fmt="sum %g", fontsize=7, colors=style.GREY, zorder=2)
