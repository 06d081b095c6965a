"""Curves of one run over its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arat_fast.report import style
from arat_fast.report.run import Numbers, Run, Series
from arat_fast.report.style import Plot
from arat_fast.report.words import duration, grouped, percent

_MAX_POINTS = 1500
_SMOOTH_ABOVE = 60
_INVARIANCE = "invariance/"
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
    makers = (_accuracy, _loss, _learning_rate, _weights, _invariance, _throughput)
    with style.plot_style():
        plots = [maker(run) for maker in makers]
    return [plot for plot in plots if plot is not None]


def draw_series(
    axes: Axes,
    series: Series,
    label: str,
    color: str,
    dashes: style.Dashes = "-",
    marker: str = "",
    **options: Any,
) -> None:
    """One line; a long one without marks as its running mean, the single values faint behind it.

    A single value is marked, since no line is drawn through it.
    """
    epochs, values = series
    window = len(values) // 30 if len(values) > _SMOOTH_ABOVE and not marker else 1
    mean = style.running_mean(values, window)
    keep = _thin(len(values))
    if window > 1:
        axes.plot(epochs[keep], values[keep], color=color, alpha=0.2, linewidth=0.7)
    if np.isfinite(mean[keep]).sum() == 1:
        marker = marker or "o"
    axes.plot(
        epochs[keep],
        mean[keep],
        color=color,
        linestyle=dashes,
        marker=marker,
        markersize=5,
        markeredgewidth=1.4,
        # A mark at 0 or at 100 % is drawn whole.
        clip_on=not marker,
        label=style.plot_text(label),
        **options,
    )


def evaluation_series(run: Run, kind: tuple[str, str], key: str) -> Series:
    """Clean or robust accuracy ("clean", "pgd") of the evaluations of one split and model."""
    lines = run.evaluated()[kind]
    return Series(np.array([e.epoch for e in lines]), np.array([getattr(e, key) for e in lines]))


def _accuracy(run: Run) -> Plot | None:
    figure, axes = style.new_axes()
    described = []
    for name, key, color in (
        ("clean", "accuracy_clean", style.CLEAN),
        ("adversarial", "accuracy_adv", style.ADVERSARIAL),
    ):
        if key in run.metrics:
            series = run.metrics[key]
            draw_series(axes, series, f"{name}, training", color)
            last = _last(series.values[-max(1, len(series.values) // 20) :])
            described.append(f"{name} in training ends near {percent(last)}")
    evaluated = run.evaluated()
    for (split, model), marker in zip(evaluated, style.MARKERS, strict=False):
        robust = f"PGD-{run.evaluations[0].num_steps}"
        for key, name, color in (
            ("clean", "clean", style.CLEAN),
            ("pgd", robust, style.ADVERSARIAL),
        ):
            series = evaluation_series(run, (split, model), key)
            label = f"{name}, {split}" + (f" ({model})" if len(evaluated) > 1 else "")
            look: dict[str, Any] = {"markerfacecolor": "white", "linewidth": 1.0}
            draw_series(axes, series, label, color, (0, (3, 2)), marker, **look)
            described.append(f"{label} ends at {percent(series.values[-1])}")
    if not described:
        return None
    style.as_percent(axes)
    caption = "Lines: batches as they were trained on, in training mode."
    if run.evaluations:
        caption += " Marks: evaluations of the whole split, in eval mode."
    return _finish(figure, axes, "Accuracy", described, caption)


def _loss(run: Run) -> Plot | None:
    if "loss" not in run.metrics:
        return None
    figure, axes = style.new_axes()
    parts = [
        (run.metrics[key], label, color, dashes)
        for key, label, color, dashes in _TERMS
        if key in run.metrics
    ]
    layers = [run.metrics[name] for name in _layers(run)]
    if layers:
        total = Series(layers[0].epochs, np.sum([layer.values for layer in layers], axis=0))
        parts.append((total, "invariance", style.GREEN, style.DASHES[3]))
    if len(parts) == 1:
        # The only term is the total.
        parts = []
    described = []
    for series, label, color, dashes in [
        (run.metrics["loss"], "total", style.INK, style.DASHES[0]),
        *parts,
    ]:
        draw_series(axes, series, label, color, dashes)
        first, last = series.values[0], _last(series.values)
        described.append(f"{label} goes from {first:.3g} to {last:.3g}")
    axes.set_ylim(bottom=0)
    caption = "Training loss"
    caption += " and its parts, weights applied: they add up." if parts else "."
    return _finish(figure, axes, "Loss", described, caption)


def _learning_rate(run: Run) -> Plot | None:
    if "lr" not in run.metrics:
        return None
    figure, axes = style.new_axes(height=2.7)
    values = run.metrics["lr"].values
    # As it was: a running mean would round off its corners.
    axes.plot(*run.metrics["lr"], color=style.INK, marker="o" if len(values) == 1 else None)
    axes.set_ylim(bottom=0)
    described = [f"from {values[0]:.3g} to {values[-1]:.3g}, at most {np.nanmax(values):.3g}"]
    return _finish(figure, axes, "Learning rate", described, "Learning rate of each logged step.")


def _weights(run: Run) -> Plot | None:
    if "w_adv" not in run.metrics:
        return None
    figure, axes = style.new_axes(height=2.7)
    described = []
    for key, label, color, dashes in (
        ("w_adv", "adversarial", style.ADVERSARIAL, style.DASHES[0]),
        ("w_clean", "clean", style.CLEAN, style.DASHES[1]),
    ):
        epochs, values = run.metrics[key]
        marker = "o" if len(values) == 1 else None
        axes.plot(epochs, values, color=color, linestyle=dashes, marker=marker, label=label)
        described.append(f"{label} ends at {_last(values):.3g}")
    axes.set_ylim(bottom=0)
    caption = "Weights of the two cross-entropies."
    if np.ptp(run.metrics["w_adv"].values) > 0:
        caption += " The better clean images are classified, the more the adversarial one counts."
    return _finish(figure, axes, "Loss weights", described, caption)


def _invariance(run: Run) -> Plot | None:
    layers = _layers(run)
    if len(layers) < 2:
        return None
    figure, axes = style.new_axes(height=2.7 + 0.09 * len(layers))
    # Layers have an order, so their colours run from dark to light in it.
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(layers)))
    described = []
    for index, (name, shade) in enumerate(zip(layers, shades, strict=True)):
        layer, series = name.removeprefix(_INVARIANCE), run.metrics[name]
        dashes = style.DASHES[index % len(style.DASHES)]
        draw_series(axes, series, layer, matplotlib.colors.to_hex(shade), dashes)
        described.append(f"{layer} ends at {_last(series.values):.3g}")
    axes.set_ylim(bottom=0)
    caption = (
        "Share of each regularised layer in the loss, from the first layer (dark) to the last: how "
        "far its adversarial features point away from the clean ones."
    )
    return _finish(figure, axes, "Invariance loss by layer", described, caption)


def _throughput(run: Run) -> Plot | None:
    if "images_per_second" not in run.metrics:
        return None
    figure, axes = style.new_axes(height=2.7)
    draw_series(axes, run.metrics["images_per_second"], "images per second", style.INK)
    axes.get_lines()[-1].set_label("_")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: grouped(value))
    middle = float(np.nanmedian(run.metrics["images_per_second"].values))
    caption = f"Training images per second; median {grouped(middle)}."
    if "train" in run.summary.wall_seconds:
        caption += f" Training took {duration(run.summary.wall_seconds['train'])}."
    described = [f"median {grouped(middle)} images per second"]
    return _finish(figure, axes, "Throughput", described, caption)


def _finish(figure: Figure, axes: Axes, title: str, described: Sequence[str], caption: str) -> Plot:
    style.epoch_axis(axes)
    style.legend_above(axes)
    return Plot(title, figure, f"{title} over epochs: {'; '.join(described)}.", caption)


def _layers(run: Run) -> list[str]:
    return [name for name in run.metrics if name.startswith(_INVARIANCE)]


def _thin(length: int) -> list[int]:
    # Every k-th point; the last one always.
    stride = -(-length // _MAX_POINTS)
    return sorted({*range(0, length, stride), length - 1})


def _last(values: Numbers) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")
