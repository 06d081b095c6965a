"""Plots of the analyses."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from arat_fast.report import style
from arat_fast.report.curves import Plot, as_percent, epoch_axis
from arat_fast.report.run import Numbers, dig, number
from arat_fast.report.words import percent

_PAIRS = (
    ("classification", "both cross-entropies", style.INK),
    ("ce_adv", "adversarial one", style.ADVERSARIAL),
    ("ce_clean", "clean one", style.CLEAN),
)
_DPI = 150
_MANY_CLASSES = 20

Lines = Sequence[Mapping[str, Any]]
"""Analysis lines of one run's metrics.jsonl, by step."""


@dataclass(frozen=True)
class Drawing:
    """A figure with what a reader needs to know of it; the fields are those of :class:`Plot`."""

    title: str
    figure: Figure
    alt: str
    caption: str

    def to_plot(self) -> Plot:
        """The drawing for a page."""
        return Plot(self.title, style.to_svg(self.figure), self.alt, self.caption)

    def to_png(self) -> bytes:
        """The drawing as a PNG file, its title in it."""
        buffer = io.BytesIO()
        self.figure.suptitle(self.title, fontsize=10.5, x=0.01, ha="left")
        self.figure.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()


def conflict_over_time(lines: Lines) -> Drawing | None:
    """Share and cosine along training, for both cross-entropies and for each."""
    with style.plot_style():
        figure = Figure(figsize=(8.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        described = []
        for (pair, label, color), dashes in zip(_PAIRS, style.DASHES, strict=False):
            for axes, key in ((left, "share"), (right, "cosine")):
                epochs, values = _pair_series(lines, pair, key)
                if len(values):
                    _curve(axes, epochs, values, label, color, dashes)
                    described.append(f"{key} for {label} ends at {values[-1]:.3f}")
        if not described:
            return None
        _conflict_axes(left, right, _unrelated(lines))
        _legend_outside(figure, left)
    return Drawing(
        "Gradient conflict along training",
        figure,
        f"Gradient conflict over epochs: {'; '.join(described)}.",
        "Left: share of the convolution and linear weights that the invariance loss pulls one way "
        "and the cross-entropy the other. Right: cosine of the two gradients, 1 for the same "
        "direction. Grey: gradients of random signs.",
    )


def conflict_between(groups: Mapping[str, Sequence[Lines]]) -> Drawing | None:
    """Share and cosine along training for several methods, each the mean over its runs.

    Args:
        groups: the analysis lines of one run or more, by name of the method.
    """
    with style.plot_style():
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        described = []
        for index, (name, runs) in enumerate(groups.items()):
            for axes, key in ((left, "share"), (right, "cosine")):
                mean = _band(
                    axes, [_pair_series(r, "classification", key) for r in runs], name, index
                )
                if mean is not None:
                    described.append(f"{key} of {name} ends at {mean:.3f}")
        if not described:
            return None
        _conflict_axes(
            left, right, _unrelated([line for runs in groups.values() for r in runs for line in r])
        )
        _legend_outside(figure, left)
    return Drawing(
        "Gradient conflict between classification and invariance loss",
        figure,
        f"Gradient conflict over epochs: {'; '.join(described)}.",
        "Left: share of weights pulled in opposite directions. Right: cosine of the gradients. "
        "Lines: mean over seeds; bands: from the smallest to the largest.",
    )


def conflict_by_layer(record: Mapping[str, Any]) -> Drawing | None:
    """Share and cosine of every layer."""
    layers = dig(record, "layers")
    found = [
        (str(path), share, cosine)
        for path, layer in (layers.items() if isinstance(layers, Mapping) else ())
        if (share := number(dig(layer, "share"))) is not None
        and (cosine := number(dig(layer, "cosine"))) is not None
    ]
    if not found:
        return None
    names = [path for path, _, _ in found]
    with style.plot_style():
        figure = Figure(figsize=(8.6, 1.5 + 0.2 * len(found)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _dots(left, names, {"share": np.array([s for _, s, _ in found])})
        _dots(right, names, {"cosine": np.array([c for _, _, c in found])})
        for axes, middle in ((left, 0.5), (right, 0.0)):
            axes.axvline(middle, color=style.GREY, linewidth=1.0, zorder=1)
        left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        left.set_xlabel("weights pulled in opposite directions")
        right.set_xlabel("cosine of the gradients")
        _around(left, [s for _, s, _ in found], 0.5, 0.05)
        _around(right, [c for _, _, c in found], 0.0, 0.1)
    worst = max(found, key=lambda entry: entry[1])
    return Drawing(
        "Gradient conflict by layer",
        figure,
        f"Share and cosine of {len(found)} layers; the largest share is {percent(worst[1])} at "
        f"{worst[0]}.",
        "Both cross-entropies against the invariance loss, layer by layer, first layer on top. "
        "Layers that the invariance loss does not reach are left out. Grey: unrelated gradients.",
    )


def mixture_by_layer(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Drawing | None:
    """Distance of clean and adversarial statistics at every BatchNorm, before and after it.

    Args:
        groups: mixture records of one run or more by name; runs of a name are averaged.
    """
    layers = dict.fromkeys(path for runs in groups.values() for r in runs for path in r["layers"])
    table = {
        key: {
            name: np.array([_mean_of(runs, str(path), key) for path in layers])
            for name, runs in groups.items()
        }
        for key in ("w2_relative", "output_w2")
    }
    shown = [values for by_name in table.values() for values in by_name.values()]
    if not layers or not all(np.isfinite(values).any() for values in shown):
        return None
    names = [str(path) for path in layers]
    described = []
    with style.plot_style():
        figure = Figure(figsize=(8.6, 1.6 + 0.22 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, (key, values) in zip((left, right), table.items(), strict=True):
            _dots(axes, names, values)
            axes.set_xlim(left=0)
            described += [f"{key} of {n}: mean {np.nanmean(v):.3f}" for n, v in values.items()]
        left.set_xlabel("before BatchNorm, in standard deviations")
        right.set_xlabel("after BatchNorm, in its own unit")
        if len(groups) > 1:
            _legend_outside(figure, left)
    return Drawing(
        "Clean against adversarial batch statistics",
        figure,
        f"Wasserstein-2 distance by layer: {'; '.join(described)}.",
        "Wasserstein-2 distance of the channel means and standard deviations of clean and "
        "adversarial images, mean over channels, first layer on top. Left: of what enters the "
        "BatchNorm, in units of the mixture’s standard deviation. Right: of what leaves it.",
    )


def mixture_over_time(groups: Mapping[str, Sequence[Lines]]) -> Drawing | None:
    """The mean over layers of the two distances along training.

    Args:
        groups: the analysis lines of one run or more, by name of the method.
    """
    described = []
    with style.plot_style():
        figure = Figure(figsize=(8.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, (name, runs) in enumerate(groups.items()):
            for axes, key in ((left, "w2_relative"), (right, "output_w2")):
                series = [_series(r, "mixture", "mean", key) for r in runs]
                mean = _band(axes, series, name, index)
                if mean is not None:
                    described.append(f"{key} of {name} ends at {mean:.3f}")
        if not described:
            return None
        for axes, label in (
            (left, "before BatchNorm, in standard deviations"),
            (right, "after BatchNorm, in its own unit"),
        ):
            epoch_axis(axes)
            axes.set_ylim(bottom=0)
            axes.set_title(label, fontsize=9, color=style.GREY, loc="left")
        if len(groups) > 1:
            _legend_outside(figure, left)
    return Drawing(
        "Clean against adversarial batch statistics along training",
        figure,
        f"Mean over layers of the Wasserstein-2 distance: {'; '.join(described)}.",
        "Wasserstein-2 distance of clean and adversarial batch statistics, mean over channels and "
        "layers.",
    )


def surface_panels(arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Drawing:
    """Margins on the planes of ``surface.npz``, one panel for each image.

    Args:
        arrays: of ``surface.npz``.
        record: of ``surface.json``.
    """
    axis, margin, labels = arrays["axis"], arrays["margin"], arrays["labels"]
    count = len(margin)
    columns = min(3, count)
    rows = -(-count // columns)
    low, high = min(-1e-6, float(margin.min())), max(1e-6, float(margin.max()))
    with style.plot_style():
        figure = Figure(figsize=(0.9 + 2.6 * columns, 0.7 + 2.5 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for index, axes in enumerate(panels.flat):
            axes.set_visible(index < count)
            if index >= count:
                continue
            mesh = axes.pcolormesh(
                axis,
                axis,
                margin[index],
                cmap="RdBu",
                norm=TwoSlopeNorm(0, low, high),
                shading="nearest",
                rasterized=True,
            )
            if margin[index].min() < 0 < margin[index].max():
                axes.contour(
                    axis, axis, margin[index], levels=[0], colors=style.INK, linewidths=1.4
                )
            # Both directions have the norm eps, so no point inside it leaves the ball.
            axes.plot([-1, 0, 1, 0, -1], [0, 1, 0, -1, 0], color=style.INK, lw=0.9, ls=(0, (4, 2)))
            axes.plot(0, 0, marker="+", color=style.INK, markersize=7)
            axes.set_title(f"is {style.plot_text(str(labels[index]))}", fontsize=9, loc="left")
            axes.set_aspect("equal")
            axes.grid(False)
        figure.supxlabel("adversarial direction, in radii", fontsize=9, color=style.GREY)
        figure.supylabel("random direction, in radii", fontsize=9, color=style.GREY)
        bar = figure.colorbar(mesh, ax=panels, shrink=0.7, pad=0.02)
        bar.set_label("margin of the right class")
        bar.ax.spines["outline"].set_visible(False)
    crossed = sum(bool((m <= 0).any()) for m in margin)
    drawn = (
        "a random sign for each pixel"
        if record["norm"] == "Linf"
        else "a random direction at right angles to it"
    )
    return Drawing(
        "The surroundings of images",
        figure,
        f"Margin of the right class around {count} images; {crossed} lose their class somewhere on "
        "the plane.",
        "Blue: right, red: wrong; the solid line is where the answer changes, the cross is the "
        f"image. Along the horizontal axis runs what PGD found, along the vertical one {drawn}. "
        "The dashed diamond lies within the ball.",
    )


def masking_curves(record: Mapping[str, Any]) -> Drawing | None:
    """Accuracy against steps and against the radius, and the other attacks."""
    samples, attacks = number(record.get("num_samples")), record.get("attacks")
    ladder = record.get("radii")
    if not samples or not isinstance(attacks, list) or not isinstance(ladder, list):
        return None
    gradient = [a for a in attacks if a["kind"] == "gradient"]
    plain = [a for a in gradient if a.get("num_restarts") == 1]
    others = [a for a in attacks if a not in plain]
    with style.plot_style():
        figure = Figure(figsize=(10.4, 3.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        steps = [a["num_steps"] for a in plain]
        left.plot(
            steps, [a["correct"] / samples for a in plain], color=style.ADVERSARIAL, marker="o"
        )
        left.set_xscale("log")
        left.set_xticks(steps, [str(s) for s in steps])
        left.minorticks_off()
        left.set_xlabel("steps of PGD")
        middle.plot(
            [r["eps"] for r in ladder],
            [r["correct"] / samples for r in ladder],
            color=style.ADVERSARIAL,
            marker="o",
        )
        middle.axvline(record["eps"], color=style.GREY, linewidth=1.0)
        middle.set_xlim(left=0)
        middle.set_xlabel("radius of the ball")
        clean = {"name": "no attack", "correct": record["clean_correct"]}
        bars = [clean, *others, plain[-1]]
        bars.sort(key=lambda a: -a["correct"])
        names = [style.plot_text(str(a["name"]), 30) for a in bars]
        right.barh(
            range(len(bars)),
            [a["correct"] / samples for a in bars],
            color=[style.CLEAN if a is clean else style.ADVERSARIAL for a in bars],
            height=0.62,
        )
        right.set_yticks(range(len(bars)), names)
        right.invert_yaxis()
        right.set_xlim(0, 1.12)
        right.grid(axis="y", visible=False)
        right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set_xticks([0, 0.5, 1.0])
        right.set_xlabel("right")
        for row, attack in enumerate(bars):
            share = attack["correct"] / samples
            right.text(share + 0.01, row, f"{100 * share:.1f}", va="center", fontsize=8)
        for axes in (left, middle):
            as_percent(axes)
        left.set_ylabel("right")
    return Drawing(
        "Attacks that must not beat each other",
        figure,
        "Accuracy: "
        + "; ".join(f"{a['name']} {percent(a['correct'] / samples)}" for a in bars)
        + ".",
        "Left and middle: more steps and larger balls must not leave more answers right, and the "
        "largest ball none; grey is the radius of the threat model. A step of PGD is a quarter of "
        "the radius long: one or two of them do not lead far, and may break little or nothing. "
        "Right: no attack without the gradient may leave less than PGD.",
    )


def margin_histogram(view: Mapping[str, NDArray[Any]]) -> Drawing:
    """Margins before and after the attack."""
    clean, adv = view["margin_clean"], view["margin_adv"]
    edges = np.histogram_bin_edges(np.concatenate([clean, adv]), bins=40)
    # An edge at 0: no bar holds both right and wrong answers.
    edges = edges - edges[np.abs(edges).argmin()]
    bins = np.append(edges, edges[-1] + (edges[1] - edges[0])).tolist()
    with style.plot_style():
        figure, axes = style.new_axes(5.4, 3.2)
        for values, label, color in (
            (clean, "as they are", style.CLEAN),
            (adv, "attacked", style.ADVERSARIAL),
        ):
            axes.hist(values, bins, color=color, alpha=0.5, label=label)
            axes.hist(values, bins, color=color, histtype="step", linewidth=1.2)
        axes.axvline(0, color=style.INK, linewidth=1.0)
        axes.set_xlabel("margin: logit of the right class minus the next one")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        style.legend_above(axes)
    return Drawing(
        "Margins",
        figure,
        f"Median margin {np.median(clean):.2f} as they are, {np.median(adv):.2f} attacked; "
        f"{int((adv <= 0).sum())} of {len(adv)} at or below zero under attack.",
        "How far ahead the right class is. Left of zero the answer is wrong.",
    )


def confusion_panel(record: Mapping[str, Any]) -> Drawing:
    """Which class is taken for which under attack."""
    counts = np.array(record["confusion"], dtype=np.float64)
    names = [style.plot_text(str(name), 16) for name in record["classes"]]
    few = len(names) <= _MANY_CLASSES
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    with style.plot_style():
        side = 3.6 if few else 5.0
        figure, axes = style.new_axes(side + 1.0, side + 0.3)
        shares = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        top = max(float(shares.max()), 0.05)
        axes.imshow(shares, cmap="Oranges", vmin=0, vmax=top)
        axes.grid(False)
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
        if few:
            long = max(map(len, names)) > 3
            axes.set_xticks(
                range(len(names)),
                names,
                rotation=60 if long else 0,
                ha="right" if long else "center",
            )
            axes.set_yticks(range(len(names)), names)
            for i, j in zip(*counts.nonzero(), strict=True):
                bold = i != j
                axes.text(
                    j,
                    i,
                    f"{counts[i, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white"
                    if shares[i, j] > 0.7 * top
                    else style.INK
                    if bold
                    else style.GREY,
                    fontweight="bold" if bold else "normal",
                )
        axes.tick_params(length=0)
    return Drawing(
        "Confusion under attack",
        figure,
        f"Counts of true classes against answers under attack; {int(wrong.sum())} of "
        f"{int(counts.sum())} are wrong.",
        "Rows: what the image is; columns: the answer under attack. Colour: share of the row that "
        "is taken for another class.",
    )


def _mean_of(runs: Sequence[Mapping[str, Any]], path: str, key: str) -> float:
    """Mean of a layer's number over the runs that have it, NaN without any."""
    found = [v for r in runs if (v := number(dig(r, "layers", path, key))) is not None]
    return float(np.mean(found)) if found else float("nan")


def _pair_series(lines: Lines, pair: str, key: str) -> tuple[Numbers, Numbers]:
    return _series(lines, "gradient_conflict", "pairs", pair, key)


def _series(lines: Lines, *path: str) -> tuple[Numbers, Numbers]:
    points = [
        (epoch, value)
        for line in lines
        if (epoch := number(line.get("epoch"))) is not None
        and (value := number(dig(line, *path))) is not None
    ]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _unrelated(lines: Lines) -> float:
    found = [number(dig(line, "gradient_conflict", "unrelated")) for line in lines]
    return next((value for value in reversed(found) if value is not None), 0.5)


def _conflict_axes(left: Axes, right: Axes, unrelated: float) -> None:
    for axes, level, name in ((left, unrelated, "share"), (right, 0.0, "cosine")):
        axes.axhline(level, color=style.GREY, linewidth=1.0, zorder=1)
        axes.set_title(
            "weights pulled in opposite directions" if name == "share" else "cosine",
            fontsize=9,
            color=style.GREY,
            loc="left",
        )
        epoch_axis(axes)
    low, high = left.get_ylim()
    left.set_ylim(min(low, unrelated - 0.03), max(high, unrelated + 0.03))
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    low, high = right.get_ylim()
    right.set_ylim(min(low, -0.1), max(high, 0.1))


def _curve(
    axes: Axes, epochs: Numbers, values: Numbers, label: str, color: str, dashes: Any
) -> None:
    marker = "o" if len(values) == 1 else None
    axes.plot(epochs, values, color=color, linestyle=dashes, marker=marker, label=label)


def _band(
    axes: Axes, series: Sequence[tuple[Numbers, Numbers]], name: str, index: int
) -> float | None:
    """Mean and range over runs at the epochs that all of them have; the last mean."""
    series = [entry for entry in series if len(entry[0])]
    if not series:
        return None
    shared = sorted(set.intersection(*(set(epochs.tolist()) for epochs, _ in series)))
    if not shared:
        return None
    rows = np.array(
        [[values[epochs.tolist().index(at)] for at in shared] for epochs, values in series]
    )
    color = style.SERIES[index % len(style.SERIES)]
    if len(rows) > 1:
        axes.fill_between(
            shared, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.18, linewidth=0
        )
    mean = rows.mean(axis=0)
    _curve(
        axes,
        np.array(shared),
        mean,
        style.plot_text(name, 40),
        color,
        style.DASHES[index % len(style.DASHES)],
    )
    return float(mean[-1])


def _dots(axes: Axes, names: Sequence[str], values: Mapping[str, Numbers]) -> None:
    """One row for each name, one mark for each entry of ``values``."""
    rows = np.arange(len(names))
    for index, (label, numbers) in enumerate(values.items()):
        axes.plot(
            numbers,
            rows,
            linestyle="none",
            marker=style.MARKERS[index % len(style.MARKERS)],
            markersize=5.5,
            color=style.INK if len(values) == 1 else style.SERIES[index % len(style.SERIES)],
            label=style.plot_text(label, 40),
            clip_on=False,
        )
    axes.set_yticks(rows, [style.plot_text(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _around(axes: Axes, values: Sequence[float], middle: float, least: float) -> None:
    reach = max(least, 1.08 * max(abs(value - middle) for value in values))
    axes.set_xlim(middle - reach, middle + reach)


def _legend_outside(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=min(len(labels), 4), handlelength=2.6
    )
