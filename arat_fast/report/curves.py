"""Curves of one run over its epochs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from arat_fast.report import style
from arat_fast.report.run import Run, Series
from arat_fast.report.style import Plot
from arat_fast.report.words import duration, grouped, metric_name, percent

_MAX_POINTS = 1500
_FAINT = 0.2
_SMOOTH_ABOVE = 60
_INVARIANCE = "invariance/"
_DOTTED = (0, (3, 2))
_WIDE = 10.0
"""Ratio of the largest value to the smallest from which on an axis is logarithmic."""
_TERMS = (
    ("ce_adv", "cross-entropy, adversarial", style.ADVERSARIAL, style.DASHES[1]),
    ("ce_clean", "cross-entropy, clean", style.CLEAN, style.DASHES[2]),
    ("mse", "distance from the guide", style.ADVERSARIAL, style.DASHES[1]),
    ("ce_guide", "cross-entropy, guide", style.CLEAN, style.DASHES[2]),
    ("kl", "divergence", style.GREEN, style.DASHES[3]),
    ("distillation", "distance from natural", style.GREEN, style.DASHES[3]),
    ("margin", "margin", style.PURPLE, style.DASHES[4]),
)
"""Name, label, colour and dashes of each part of a loss."""


def run_plots(run: Run) -> list[Plot]:
    """Every plot that the run's metrics allow."""
    makers: list[tuple[str | None, Callable[[Run], Plot | None]]] = [
        (None, _accuracy),
        ("loss", _loss),
        ("lr", _range_test if run.config.schedule.name == "range" else _learning_rate),
        ("w_adv", _weights),
        (None, _invariance),
        ("images_per_second", _throughput),
    ]
    with style.plot_style():
        plots = [make(run) for needs, make in makers if needs is None or needs in run.metrics]
    return [plot for plot in plots if plot is not None]


def draw_series(
    axes: Axes,
    series: Series,
    label: str,
    color: str,
    dashes: style.Dashes = "-",
    marker: str = "",
    smooth: bool = True,
    **options: Any,
) -> None:
    """One line; a long one without marks as its running mean, the single values faint behind it.

    A single value is marked, since no line is drawn through it. A line without a label is not in
    the legend.
    """
    epochs, values = series
    long = smooth and len(values) > _SMOOTH_ABOVE and not marker
    mean = style.running_mean(values, len(values) // 30) if long else values
    # Every k-th point; the last one always.
    stride = -(-len(values) // _MAX_POINTS)
    keep = sorted({*range(0, len(values), stride), len(values) - 1})
    if long:
        axes.plot(epochs[keep], values[keep], color=color, alpha=_FAINT, linewidth=0.7)
    if np.isfinite(mean[keep]).sum() == 1:
        marker = marker or "o"
    look: dict[str, Any] = {"linestyle": dashes, "markersize": 5, "markeredgewidth": 1.4}
    look["label"] = style.plot_text(label) if label else None
    # A mark at 0 or at 100 % is drawn whole.
    look |= {"color": color, "marker": marker, "clip_on": not marker, **options}
    axes.plot(epochs[keep], mean[keep], **look)


class _Line(NamedTuple):
    """What :func:`draw_series` draws."""

    series: Series
    label: str
    color: str
    dashes: style.Dashes = "-"

    @property
    def last(self) -> float:
        """The last finite value, NaN without one."""
        finite = self.series.values[np.isfinite(self.series.values)]
        return float(finite[-1]) if len(finite) else float("nan")


def _accuracy(run: Run) -> Plot | None:
    figure, axes = style.new_axes()
    described = []

    def draw(name: str, series: Series, *look: Any, **options: Any) -> None:
        draw_series(axes, series, name, *look, **options)
        described.append(f"{name} ends at {percent(series.values[-1])}")

    for name, key, color in (
        ("clean", "accuracy_clean", style.CLEAN),
        ("attacked", "accuracy_adv", style.ADVERSARIAL),
    ):
        if key in run.metrics:
            draw(f"{name}, training", run.metrics[key], color)
    evaluated = run.evaluated()
    hollow: dict[str, Any] = {"markerfacecolor": "white", "linewidth": 1.0}
    for ((split, model), series), marker in zip(evaluated.items(), style.MARKERS, strict=False):
        of = split + (f" ({model})" if len(evaluated) > 1 else "")
        robust = f"PGD-{run.evaluations[0].num_steps}, {of}"
        draw(f"clean, {of}", series["clean"], style.CLEAN, _DOTTED, marker, **hollow)
        draw(robust, series["pgd"], style.ADVERSARIAL, _DOTTED, marker, **hollow)
    looks = [(look.epoch, look.pgd) for look in run.looks if look.pgd is not None]
    if looks:
        name = f"PGD-{max(look.num_steps for look in run.looks)}, watched"
        draw(name, Series(*np.array(looks).T), style.PURPLE, style.DASHES[1], ".")
    final = run.summary.accuracy if run.epochs is not None else {}
    for key, accuracy in final.items():
        color = style.CLEAN if key == "clean" else style.ADVERSARIAL
        if key != "clean_branch":
            point = Series(np.array([run.epochs]), np.array([accuracy.value]))
            name = "clean" if key == "clean" else metric_name(key)
            # A frame, in which a star that is near it can be seen.
            frame = {"marker": "D", "markersize": 12, "markerfacecolor": "none", "color": style.INK}
            star = {"marker": "*", "markersize": 12, "markeredgecolor": "white", "color": color}
            mark = frame if key == "autoattack" else star
            draw(f"{name}, final", point, linestyle="", zorder=4, **mark)
    for place, words in _falls(run):
        axes.axvline(place, color=style.INK, linestyle=(0, (1, 2)), linewidth=1.2)
        described.append(words)
    if not described:
        return None
    style.as_percent(axes)
    caption = "Lines: batches as they were trained on, in training mode"
    if "clean_branch" in run.summary.accuracy:
        caption += ", clean ones on the branch for clean images"
    caption += "."
    if run.evaluations:
        caption += " Hollow marks: evaluations between epochs, in eval mode."
    if len(evaluated) > 1:
        caption += " (ema): the averaged weights, which are the result; (last): those in training."
    if final:
        marks = "Stars and diamond" if "autoattack" in final else "Stars"
        caption += f" {marks}: the final evaluation, {run.summary.split} images."
    if looks:
        caption += " Dots: the watch for catastrophic overfitting, a few images."
    if falls := _falls(run):
        caption += f" Dotted upright: {'; '.join(words for _, words in falls)}."
    return _finish(figure, axes, "Accuracy", described, caption)


def _falls(run: Run) -> list[tuple[float, str]]:
    """Where robustness was lost, and where the run went back to, with words for each."""
    found = []
    for look in run.looks:
        if look.fell:
            found.append((look.epoch, f"catastrophic overfitting in epoch {look.epoch:.1f}"))
        if look.fell_at is not None:
            words = f"back here from catastrophic overfitting in epoch {look.fell_at:.1f}"
            found.append((look.epoch, words))
    return found


def _loss(run: Run) -> Plot:
    known = [term for term in _TERMS if term[0] in run.metrics]
    parts = [_Line(run.metrics[key], label, color, dash) for key, label, color, dash in known]
    layers = [run.metrics[name] for name in _layers(run)]
    if layers:
        total = Series(layers[0].epochs, np.sum([layer.values for layer in layers], axis=0))
        parts.append(_Line(total, "invariance", style.GREEN, style.DASHES[3]))
    if len(parts) == 1:
        # The only term is the total.
        parts = []
    lines = [_Line(run.metrics["loss"], "total", style.INK), *parts]
    described = [f"{x.label} goes from {x.series.values[0]:.3g} to {x.last:.3g}" for x in lines]
    caption = "Training loss" + (" and its parts, weights applied: they add up." if parts else ".")
    if "w_adv" in run.metrics and np.ptp(run.metrics["w_adv"].values) > 0:
        caption += " A cross-entropy rises and falls with its weight, too."
    return _plot("Loss", lines, caption, described, height=3.1, logarithmic=_wide(lines))


def _learning_rate(run: Run) -> Plot:
    values = run.metrics["lr"].values
    described = [f"from {values[0]:.3g} to {values[-1]:.3g}, at most {np.nanmax(values):.3g}"]
    line = _Line(run.metrics["lr"], "", style.INK)
    # A logged rate holds back to the one before, or to where the rate was lowered.
    stairs = "steps-pre" if run.config.schedule.name.endswith("steps") else "default"
    caption = "Learning rate of each logged step."
    return _plot("Learning rate", [line], caption, described, smooth=False, drawstyle=stairs)


def _range_test(run: Run) -> Plot:
    """Loss over the learning rate, on a logarithmic axis."""
    rates, losses = run.metrics["lr"].values, run.metrics["loss"].values
    figure, axes = style.new_axes(height=3.1)
    axes.semilogx(rates, losses, color=style.LINE, linewidth=0.7)
    mean = style.running_mean(losses, max(len(losses) // 20, 1))
    axes.semilogx(rates, mean, color=style.INK)
    lowest = int(np.nanargmin(mean))
    axes.set_ylim(0, 1.5 * float(np.nanmax(mean[: lowest + 1])))
    axes.set_xlabel("learning rate")
    at = f"the loss is lowest at {rates[lowest]:.3g}"
    caption = (
        f"Range test, single steps faint: {at}; a third to a tenth of where it turns is a usual "
        "learning rate."
    )
    return Plot("Loss by learning rate", figure, f"From {rates[0]:.3g}: {at}.", caption)


def _weights(run: Run) -> Plot:
    lines = [
        _Line(run.metrics["w_adv"], "adversarial", style.ADVERSARIAL),
        _Line(run.metrics["w_clean"], "clean", style.CLEAN, style.DASHES[1]),
    ]
    caption = "Weights of the two cross-entropies."
    if np.ptp(run.metrics["w_adv"].values) > 0:
        caption += " The better clean images are classified, the more the adversarial one counts."
    return _plot("Loss weights", lines, caption, smooth=False, drawstyle="steps-pre")


def _invariance(run: Run) -> Plot | None:
    layers = _layers(run)
    if len(layers) < 2:
        return None
    # Layers have an order, and their colours run with it: none too light, nor too dark inverted.
    shades = matplotlib.colormaps["plasma"](np.linspace(0.05, 0.7, len(layers)))
    dashes = itertools.cycle(style.DASHES)
    lines = [
        _Line(run.metrics[name], name.removeprefix(_INVARIANCE), to_hex(shade), dash)
        for name, shade, dash in zip(layers, shades, dashes, strict=False)
    ]
    caption = (
        "Some layers learn to give an image and its adversarial version the same features: 0 where "
        "these point the same way. A line is what one layer adds to the loss, first layer first: "
        "its distance, 1 less the cosine, times gamma, divided by the number of layers."
    )
    height = 2.7 + 0.09 * len(layers)
    return _plot(
        "Invariance loss by layer", lines, caption, height=height, logarithmic=_wide(lines)
    )


def _throughput(run: Run) -> Plot:
    series = run.metrics["images_per_second"]
    middle = grouped(float(np.nanmedian(series.values)))
    caption = f"Training images per second; median {middle}."
    if "train" in run.summary.wall_seconds:
        caption += f" Training took {duration(run.summary.wall_seconds['train'])}."
    described = [f"median {middle} images per second"]
    plot = _plot("Throughput", [_Line(series, "", style.INK)], caption, described)
    plot.figure.axes[0].yaxis.set_major_formatter(lambda value, _: grouped(value))
    return plot


def _plot(
    title: str,
    lines: Sequence[_Line],
    caption: str,
    described: Sequence[str] | None = None,
    *,
    height: float = 2.7,
    logarithmic: bool = False,
    **options: Any,
) -> Plot:
    """Lines, from 0 on unless ``logarithmic``; without a description, the last value of each is
    told."""
    figure, axes = style.new_axes(height=height)
    for line in lines:
        draw_series(axes, *line, **options)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        caption += " The axis is logarithmic."
    else:
        axes.set_ylim(bottom=0)
    described = described or [f"{line.label} ends at {line.last:.3g}" for line in lines]
    return _finish(figure, axes, title, described, caption)


def _wide(lines: Sequence[_Line]) -> bool:
    """Whether the values are positive and too far apart for a linear axis."""
    values = np.concatenate([line.series.values for line in lines])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() > _WIDE * values.min()


def _finish(figure: Figure, axes: Axes, title: str, described: Sequence[str], caption: str) -> Plot:
    style.epoch_axis(axes)
    style.legend_above(axes)
    if any(line.get_alpha() == _FAINT for line in axes.lines):
        caption += " Faint: the values as logged; the line is their running mean."
    return Plot(title, figure, f"{title} over epochs: {'; '.join(described)}.", caption)


def _layers(run: Run) -> list[str]:
    return [name for name in run.metrics if name.startswith(_INVARIANCE)]
