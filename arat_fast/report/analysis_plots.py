"""Plots of the analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from arat_fast.report import style
from arat_fast.report.run import Numbers, TrainingAnalysis
from arat_fast.report.style import Plot, as_percent, epoch_axis
from arat_fast.report.words import percent

Lines: TypeAlias = Sequence[TrainingAnalysis]
"""The analyses of one run along its training."""
Record: TypeAlias = Mapping[str, Any]
"""What one analysis wrote, as JSON types."""

_TOTAL = "classification"
_PAIRS = {
    _TOTAL: ("both cross-entropies", style.INK),
    "ce_adv": ("adversarial one", style.ADVERSARIAL),
    "ce_clean": ("clean one", style.CLEAN),
}
_DISTANCES = {
    "w2_relative": "before BatchNorm, in standard deviations",
    "output_w2": "after BatchNorm, in its own unit",
}
_CONFLICT = {"share": "weights pulled in opposite directions", "cosine": "cosine of the gradients"}
_RANDOM = "Grey: gradients of random signs, opposite in half of the weights that both losses reach"


def conflict_over_time(lines: Lines) -> Plot | None:
    """Share and cosine along training, for both cross-entropies and for each."""
    return _conflict_plot(
        "Gradient conflict along training",
        "Left: share of the convolution and linear weights that the invariance loss pulls one way "
        "and the cross-entropy the other. Right: cosine of the two gradients, 1 for the same "
        f"direction. {_RANDOM}.",
        {label: ([lines], pair) for pair, (label, _) in _PAIRS.items()},
        [color for _, color in _PAIRS.values()],
    )


def conflict_between(groups: Mapping[str, Sequence[Lines]]) -> Plot | None:
    """Share and cosine along training for several methods, each the mean over its runs.

    Args:
        groups: the analyses of one run or more, by name of the method.
    """
    return _conflict_plot(
        "Gradient conflict between classification and invariance loss",
        "Left: share of weights pulled in opposite directions. Right: cosine of the gradients. "
        f"Lines: mean over seeds; bands: from the smallest to the largest. {_RANDOM}.",
        {name: (runs, _TOTAL) for name, runs in groups.items()},
    )


def mixture_over_time(groups: Mapping[str, Sequence[Lines]]) -> Plot | None:
    """The mean over layers of the two distances along training.

    Args:
        groups: the analyses of one run or more, by name of the method.
    """
    with style.plot_style():
        figure, panels, described = _panels(
            {name: (runs, None) for name, runs in groups.items()}, _DISTANCES
        )
        for axes in panels:
            axes.set_ylim(bottom=0)
    if not described:
        return None
    return Plot(
        "Clean against adversarial batch statistics along training",
        figure,
        f"Mean over layers of the Wasserstein-2 distance: {described}.",
        "Wasserstein-2 distance of clean and adversarial batch statistics, mean over channels and "
        "layers.",
    )


def conflict_by_layer(record: Record) -> Plot | None:
    """Share and cosine of every layer."""
    found = {path: e for path, e in record["layers"].items() if e["share"] is not None}
    if not found:
        return None
    values = {key: np.array([entry[key] for entry in found.values()]) for key in _CONFLICT}
    with style.plot_style():
        figure, panels = _layer_panels(list(found), _CONFLICT, {"": values})
        for axes, key, middle, least in zip(
            panels, _CONFLICT, (0.5, 0.0), (0.05, 0.1), strict=True
        ):
            axes.axvline(middle, color=style.GREY, linewidth=1.0, zorder=1)
            reach = max(least, 1.08 * np.abs(values[key] - middle).max())
            axes.set_xlim(middle - reach, middle + reach)
        panels[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    worst = max(found, key=lambda path: found[path]["share"])
    return Plot(
        "Gradient conflict by layer",
        figure,
        f"Share and cosine of {len(found)} layers; the largest share is "
        f"{percent(found[worst]['share'])} at {worst}.",
        "Both cross-entropies against the invariance loss, layer by layer, first layer on top. "
        f"Layers that the invariance loss does not reach are left out. {_RANDOM}: {percent(0.5)} "
        f"in each layer shown, {percent(record['unrelated'])} of all weights.",
    )


def mixture_by_layer(groups: Mapping[str, Sequence[Record]]) -> Plot | None:
    """Distance of clean and adversarial statistics at every BatchNorm, before and after it.

    Args:
        groups: mixture records of one run or more by name; runs of a name are averaged.
    """
    layers = list(dict.fromkeys(p for runs in groups.values() for r in runs for p in r["layers"]))
    if not layers:
        return None
    numbers: dict[str, dict[str, Numbers]] = {name: {} for name in groups}
    for name, runs in groups.items():
        for key in _DISTANCES:
            found = [[r["layers"][p][key] for r in runs if p in r["layers"]] for p in layers]
            values = np.array([np.mean(each) if each else np.nan for each in found])
            numbers[name][key] = values
    described = [
        f"{key} of {name}: mean {np.nanmean(values[key]):.3f}"
        for key in _DISTANCES
        for name, values in numbers.items()
    ]
    with style.plot_style():
        figure, panels = _layer_panels(layers, _DISTANCES, numbers)
        for axes in panels:
            axes.set_xlim(left=0)
        _legend_below(figure, panels[0])
    return Plot(
        "Clean against adversarial batch statistics",
        figure,
        f"Wasserstein-2 distance by layer: {'; '.join(described)}.",
        "Wasserstein-2 distance of the channel means and standard deviations of clean and "
        "adversarial images, mean over channels, first layer on top. Left: of what enters the "
        "BatchNorm, in units of the mixture’s standard deviation. Right: of what leaves it.",
    )


def masking_curves(record: Record) -> Plot:
    """Accuracy against steps and against the radius, and the other attacks."""
    samples = record["num_samples"]
    plain = [a for a in record["attacks"] if a.get("num_restarts") == 1]
    others = [a for a in record["attacks"] if a not in plain]
    clean = {"name": "no attack", "correct": record["clean_correct"]}
    bars = sorted([clean, *others, plain[-1]], key=lambda a: -a["correct"])
    with style.plot_style():
        figure = Figure(figsize=(10.4, 3.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        for axes, found, key, label in (
            (left, plain, "num_steps", "steps of PGD"),
            (middle, record["radii"], "eps", "radius of the ball"),
        ):
            shares = [a["correct"] / samples for a in found]
            axes.plot([a[key] for a in found], shares, color=style.ADVERSARIAL, marker="o")
            axes.set_xlabel(label)
            as_percent(axes)
        steps = [a["num_steps"] for a in plain]
        left.set_xscale("log")
        left.set_xticks(steps, [str(s) for s in steps])
        left.minorticks_off()
        left.set_ylabel("right")
        middle.axvline(record["eps"], color=style.GREY, linewidth=1.0)
        middle.set_xlim(left=0)
        drawn = right.barh(
            [style.plot_text(a["name"], 30) for a in bars],
            [a["correct"] / samples for a in bars],
            color=[style.CLEAN if a is clean else style.ADVERSARIAL for a in bars],
            height=0.62,
        )
        right.bar_label(drawn, fmt=lambda share: f"{100 * share:.1f}", padding=3, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(0, 1.12)
        right.grid(axis="y", visible=False)
        right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set_xticks([0, 0.5, 1.0])
        right.set_xlabel("right")
    described = "; ".join(f"{a['name']} {percent(a['correct'] / samples)}" for a in bars)
    return Plot(
        "Attacks that must not beat each other",
        figure,
        f"Accuracy: {described}.",
        "Left and middle: more steps and larger balls must not leave more answers right, and the "
        "largest ball none; grey is the radius of the threat model. A step of PGD is a quarter of "
        "the radius long: one or two of them do not lead far, and may break little or nothing. "
        "Right: no attack without the gradient may leave less than PGD.",
    )


_Groups: TypeAlias = Mapping[str, tuple[Sequence[Lines], str | None]]
"""Runs by name, and the pair of gradients; the mixture for None."""


def _conflict_plot(
    title: str, caption: str, groups: _Groups, colors: Sequence[str] = style.SERIES
) -> Plot | None:
    conflicts = [e.gradient_conflict for runs, _ in groups.values() for run in runs for e in run]
    # Losses that reach other layers have another one.
    unrelated = {conflict["unrelated"] for conflict in conflicts if conflict}
    with style.plot_style():
        figure, (left, right), described = _panels(groups, _CONFLICT, colors)
        if not described:
            return None
        for axes, levels, room in ((left, unrelated, 0.03), (right, {0.0}, 0.1)):
            for level in levels:
                axes.axhline(level, color=style.GREY, linewidth=1.0, zorder=1)
                low, high = axes.get_ylim()
                axes.set_ylim(min(low, level - room), max(high, level + room))
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return Plot(title, figure, f"Gradient conflict over epochs: {described}.", caption)


def _panels(
    groups: _Groups, titles: Mapping[str, str], colors: Sequence[str] = style.SERIES
) -> tuple[Figure, Sequence[Axes], str]:
    """Two panels over epochs: mean and range over the runs of each group, and it in words."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    described = []
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for index, (name, (runs, pair)) in enumerate(groups.items()):
            points = [found for lines in runs if (found := _points(lines, key, pair))]
            # At the epochs that all of them have.
            shared = sorted(set.intersection(*map(set, points))) if points else []
            if not shared:
                continue
            rows = np.array([[point[epoch] for epoch in shared] for point in points])
            color, mean = colors[index % len(colors)], rows.mean(axis=0)
            if len(rows) > 1:
                low, high = rows.min(axis=0), rows.max(axis=0)
                axes.fill_between(shared, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(
                shared,
                mean,
                color=color,
                linestyle=style.DASHES[index % len(style.DASHES)],
                marker="o" if len(mean) == 1 else None,
                label=style.plot_text(name, 40),
            )
            described.append(f"{key} of {name} ends at {mean[-1]:.3f}")
        epoch_axis(axes)
        axes.set_title(title, fontsize=9, color=style.GREY, loc="left")
    _legend_below(figure, panels[0])
    return figure, panels, "; ".join(described)


def _points(lines: Lines, key: str, pair: str | None) -> dict[float, float]:
    """A number of the analyses by epoch, where it is defined."""
    found = {}
    for line in lines:
        if pair is None:
            record = line.mixture and line.mixture["mean"]
        else:
            record = line.gradient_conflict and line.gradient_conflict["pairs"].get(pair)
        if record and record[key] is not None:
            found[line.epoch] = record[key]
    return found


def _layer_panels(
    layers: Sequence[str], titles: Mapping[str, str], groups: Mapping[str, Mapping[str, Numbers]]
) -> tuple[Figure, Sequence[Axes]]:
    """Two panels with a row for each layer, the first on top."""
    figure = Figure(figsize=(8.6, 1.5 + 0.21 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    look: dict[str, Any] = {"linestyle": "none", "markersize": 5.5, "clip_on": False}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        axes.set_xlabel(title)
        axes.set_yticks(range(len(layers)), [style.plot_text(layer) for layer in layers])
        axes.set_ylim(len(layers) - 0.5, -0.5)
        for index, (name, values) in enumerate(groups.items()):
            look["color"] = style.INK if len(groups) == 1 else style.color(index)
            look["marker"] = style.marker(index)
            axes.plot(values[key], range(len(layers)), label=name, **look)
    return figure, panels


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = min(len(labels), 4)
        figure.legend(handles, labels, loc="outside lower center", ncol=columns, handlelength=2.6)
