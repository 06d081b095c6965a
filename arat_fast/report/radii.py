"""Accuracy over the radius of the ball, of networks that were evaluated in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from arat_fast.report import style
from arat_fast.report.curves import draw_series
from arat_fast.report.run import Accuracy, Series, in_order
from arat_fast.report.style import Plot
from arat_fast.report.words import metric_name, norm_name, percent, plain

_Rows = dict[float, tuple[Accuracy | None, ...]]


class Radii(NamedTuple):
    """What was measured in several balls of one norm.

    Attributes:
        norm: of the balls, as it is written.
        attacks: names, in the order of their columns.
        rows: by radius the accuracy under each attack, None where it was not run; from the smallest
            on, and first that of the clean images, at 0.
        plot: the same as curves.
    """

    norm: str
    attacks: tuple[str, ...]
    rows: _Rows
    plot: Plot


def by_radius(measured: Iterable[Mapping[str, Accuracy]]) -> list[Radii]:
    """Accuracies by radius and attack, for each norm with two radii or more.

    Args:
        measured: accuracies by name of each evaluation of one network; of two of one attack in one
            ball that on more images counts.
    """
    found: dict[str, dict[str, dict[float, Accuracy]]] = {}
    clean: dict[float, Accuracy] = {}
    for accuracies in measured:
        for name, accuracy in accuracies.items():
            eps, radii = accuracy.details.get("eps", 0.0), clean
            if eps:
                attacks = found.setdefault(norm_name(accuracy.details["norm"]), {})
                radii = attacks.setdefault(name, {})
            elif name != "clean":
                continue
            if eps not in radii or radii[eps].num_samples < accuracy.num_samples:
                radii[eps] = accuracy
    tables = []
    for norm, attacks in found.items():
        attacks = in_order(attacks)
        every = sorted({eps for radii in attacks.values() for eps in radii})
        if len(every) > 1:
            columns = [{**clean, **radii} for radii in attacks.values()]
            rows = {e: tuple(c.get(e) for c in columns) for e in (*clean, *every)}
            tables.append(Radii(norm, tuple(attacks), rows, _plot(norm, tuple(attacks), rows)))
    return tables


def _plot(norm: str, attacks: tuple[str, ...], rows: _Rows) -> Plot:
    described = []
    with style.plot_style():
        figure, axes = style.new_axes()
        for number, name in enumerate(attacks):
            points = {eps: a.value for eps, row in rows.items() if (a := row[number]) is not None}
            series = Series(np.array(list(points)), np.array(list(points.values())))
            dashes = style.DASHES[number % len(style.DASHES)]
            look = style.color(number), dashes, style.marker(number)
            draw_series(axes, series, metric_name(name), *look, smooth=False)
            told = ", ".join(f"{percent(a)} at {plain(eps)}" for eps, a in points.items())
            described.append(f"{metric_name(name)} {told}")
        style.as_percent(axes)
        axes.set_xlim(0, 1.04 * max(rows))
        ticks: list[float] = []
        for eps in rows:
            if not ticks or eps - ticks[-1] > 0.09 * max(rows):
                ticks.append(eps)
        axes.set_xticks(ticks, [plain(eps) for eps in ticks])
        axes.set_xlabel(f"eps, {norm}")
        style.legend_above(axes)
    return Plot("Right answers", figure, f"{norm}: {'; '.join(described)}.", "")
