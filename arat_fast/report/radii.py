"""Accuracy over the radius of the ball, of networks that were evaluated in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from arat_fast.report import style
from arat_fast.report.curves import draw_series
from arat_fast.report.run import Accuracy, Series
from arat_fast.report.style import Plot
from arat_fast.report.words import metric_name, percent, plain


@dataclass(frozen=True)
class Radii:
    """What was measured in several balls of one norm.

    Attributes:
        norm: of the balls.
        attacks: names, in the order of their columns.
        rows: radius and the accuracy under each attack, None where it was not run; from the
            smallest on.
        plot: the same as curves.
    """

    norm: str
    attacks: tuple[str, ...]
    rows: tuple[tuple[float, tuple[Accuracy | None, ...]], ...]
    plot: Plot


def by_radius(measured: Iterable[Mapping[str, Accuracy]]) -> list[Radii]:
    """Accuracies by radius and attack, for each norm with two radii or more.

    Args:
        measured: accuracies by name of each evaluation of one network; of two of one attack in one
            ball that on more images counts.
    """
    found: dict[str, dict[str, dict[float, Accuracy]]] = {}
    clean: Accuracy | None = None
    for accuracies in measured:
        for name, accuracy in accuracies.items():
            if name == "clean" and (clean is None or accuracy.num_samples > clean.num_samples):
                clean = accuracy
            if {"norm", "eps"} <= accuracy.details.keys():
                eps = float(accuracy.details["eps"])
                radii = found.setdefault(accuracy.details["norm"], {}).setdefault(name, {})
                if eps not in radii or radii[eps].num_samples < accuracy.num_samples:
                    radii[eps] = accuracy
    tables = []
    for norm, attacks in found.items():
        every = sorted({eps for radii in attacks.values() for eps in radii})
        if len(every) < 2:
            continue
        rows = tuple((eps, tuple(radii.get(eps) for radii in attacks.values())) for eps in every)
        tables.append(Radii(norm, tuple(attacks), rows, _plot(norm, attacks, clean)))
    return tables


def _plot(
    norm: str, attacks: Mapping[str, Mapping[float, Accuracy]], clean: Accuracy | None
) -> Plot:
    described = []
    with style.plot_style():
        figure, axes = style.new_axes()
        for number, (name, radii) in enumerate(attacks.items()):
            points = {0.0: clean} if clean is not None else {}
            points |= dict(sorted(radii.items()))
            series = Series(np.array(list(points)), np.array([a.value for a in points.values()]))
            label = metric_name(name)
            dashes = style.DASHES[number % len(style.DASHES)]
            draw_series(
                axes, series, label, style.color(number), dashes, style.marker(number), False
            )
            told = ", ".join(f"{percent(a.value)} at {plain(eps)}" for eps, a in points.items())
            described.append(f"{label} {told}")
        style.as_percent(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"radius, {norm}")
        style.legend_above(axes)
    caption = "Share of right answers; radius 0 is the images as they are." if clean else ""
    return Plot(f"Accuracy by radius, {norm}", figure, f"{'; '.join(described)}.", caption)
