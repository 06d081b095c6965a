"""Curves of one run over its epochs."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from arat_fast.report import style
from arat_fast.report.html import Html, image, tag
from arat_fast.report.run import Numbers, Run
from arat_fast.report.words import duration, grouped, percent

_MAX_POINTS = 1500
_SMOOTH_ABOVE = 60
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


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: heading.
        svg: the picture.
        alt: what it shows, with its last values.
        caption: how to read it.
    """

    title: str
    svg: bytes
    alt: str
    caption: str

    def to_html(self) -> Html:
        """The plot as a figure element."""
        return tag(
            "figure",
            tag("h3", self.title),
            image(self.svg, "image/svg+xml", self.alt, class_="plot"),
            tag("figcaption", self.caption),
            class_="panel",
        )


def run_plots(run: Run) -> list[Plot]:
    """Every plot that the run's metrics allow."""
    makers = (_accuracy, _loss, _learning_rate, _weights, _invariance, _throughput)
    with style.plot_style():
        plots = [maker(run) for maker in makers]
    return [plot for plot in plots if plot is not None]


def draw_series(
    axes: Axes,
    epochs: Numbers,
    values: Numbers,
    label: str,
    color: str,
    dashes: str | tuple[int, tuple[int, ...]] = "-",
    marker: str = "",
    hollow: bool = False,
) -> None:
    """One line; a long one without marks as its running mean, the single values faint behind it.

    A single value is marked, since no line is drawn through it.
    """
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
        markerfacecolor="white" if hollow else color,
        markeredgewidth=1.4,
        # A mark at 0 or at 100 % is drawn whole.
        clip_on=not marker,
        label=style.plot_text(label),
    )


def as_percent(axes: Axes) -> None:
    """A vertical axis from 0 to 100 %."""
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def epoch_axis(axes: Axes) -> None:
    """A horizontal axis of epochs from 0 to the last one drawn, marked at whole ones."""
    last = float(axes.dataLim.intervalx[1])
    # Room for a mark at the last one.
    axes.set_xlim(0, 1.04 * last if np.isfinite(last) and last > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def eval_keys(run: Run) -> tuple[str, str]:
    """Names of the clean and the robust accuracy of the evaluation lines, for a legend."""
    steps = next((e["num_steps"] for e in run.evals if isinstance(e.get("num_steps"), int)), None)
    return "clean", f"PGD-{steps}" if steps is not None else "PGD"


def _accuracy(run: Run) -> Plot | None:
    figure, axes = style.new_axes()
    described = []
    for key, name, color in (
        ("accuracy_clean", "clean", style.CLEAN),
        ("accuracy_adv", "adversarial", style.ADVERSARIAL),
    ):
        epochs, values = run.train_series(key)
        if len(values):
            draw_series(axes, epochs, values, f"{name}, training", color)
            last = _last(values[-max(1, len(values) // 20) :])
            described.append(f"{name} in training ends near {percent(last)}")
    several = len(run.eval_kinds()) > 1
    for index, (split, model) in enumerate(run.eval_kinds()):
        for key, name, color in zip(
            ("clean", "pgd"), eval_keys(run), (style.CLEAN, style.ADVERSARIAL), strict=True
        ):
            epochs, values = run.eval_series(key, split, model)
            if len(values) == 0:
                continue
            label = f"{name}, {split}" + (f" ({model})" if several else "")
            axes.plot(
                epochs,
                values,
                color=color,
                linestyle=(0, (3, 2)),
                linewidth=1.0,
                marker=style.MARKERS[index % len(style.MARKERS)],
                markersize=5.5,
                markerfacecolor="white",
                markeredgewidth=1.4,
                clip_on=False,
                label=style.plot_text(label),
            )
            described.append(f"{label} ends at {percent(_last(values))}")
    if not described:
        return None
    as_percent(axes)
    caption = "Lines: batches as they were trained on, in training mode."
    if run.evals:
        caption += " Marks: evaluations of the whole split, in eval mode."
    return _finish(figure, axes, "Accuracy", described, caption)


def _loss(run: Run) -> Plot | None:
    figure, axes = style.new_axes()
    described = []
    series = [("loss", "total", style.INK, style.DASHES[0], run.train_series("loss"))]
    for key, label, color, dashes in _TERMS:
        series.append((key, label, color, dashes, run.train_series(key)))
    layers = _layers(run)
    if layers:
        total = _sum_of_layers(run, layers)
        series.append(("", "invariance", style.GREEN, style.DASHES[3], total))
    present = [entry for entry in series if len(entry[4][1])]
    if len(present) == 2:
        # The only term is the total.
        present = present[:1]
    for _, label, color, dashes, (epochs, values) in present:
        draw_series(axes, epochs, values, label, color, dashes)
        described.append(f"{label} goes from {values[0]:.3g} to {_last(values):.3g}")
    if not present:
        return None
    axes.set_ylim(bottom=0)
    caption = "Training loss"
    caption += " and its parts, weights applied: they add up." if len(present) > 1 else "."
    return _finish(figure, axes, "Loss", described, caption)


def _invariance(run: Run) -> Plot | None:
    layers = _layers(run)
    if len(layers) < 2:
        return None
    figure, axes = style.new_axes(height=2.7 + 0.09 * len(layers))
    # Layers have an order, so their colours run from dark to light in it.
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(layers)))
    described = []
    for index, layer in enumerate(layers):
        epochs, values = run.train_series(f"invariance/{layer}")
        color = matplotlib.colors.to_hex(shades[index])
        draw_series(axes, epochs, values, layer, color, style.DASHES[index % len(style.DASHES)])
        described.append(f"{layer} ends at {_last(values):.3g}")
    axes.set_ylim(bottom=0)
    caption = (
        "Share of each regularised layer in the loss, from the first layer (dark) to the last: how "
        "far its adversarial features point away from the clean ones."
    )
    return _finish(figure, axes, "Invariance loss by layer", described, caption)


def _learning_rate(run: Run) -> Plot | None:
    epochs, values = run.train_series("lr")
    if len(values) == 0:
        return None
    figure, axes = style.new_axes(height=2.7)
    marker = "o" if len(values) == 1 else None
    axes.plot(epochs, values, color=style.INK, marker=marker, clip_on=False)
    axes.set_ylim(bottom=0)
    described = [f"from {values[0]:.3g} to {values[-1]:.3g}, at most {np.nanmax(values):.3g}"]
    return _finish(figure, axes, "Learning rate", described, "Learning rate of each logged step.")


def _weights(run: Run) -> Plot | None:
    figure, axes = style.new_axes(height=2.7)
    described = []
    for key, label, color, dashes, marker in (
        ("w_adv", "adversarial", style.ADVERSARIAL, style.DASHES[0], "o"),
        ("w_clean", "clean", style.CLEAN, style.DASHES[1], "s"),
    ):
        epochs, values = run.train_series(key)
        if len(values):
            axes.plot(
                epochs,
                values,
                color=color,
                linestyle=dashes,
                marker=marker if len(values) == 1 else None,
                clip_on=False,
                label=label,
            )
            described.append(f"{label} ends at {_last(values):.3g}")
    if not described:
        return None
    axes.set_ylim(bottom=0)
    caption = "Weights of the two cross-entropies."
    if run.setting("objective", "balance") in ("previous_epoch", "probe"):
        caption += " The better clean images are classified, the more the adversarial one counts."
    return _finish(figure, axes, "Loss weights", described, caption)


def _throughput(run: Run) -> Plot | None:
    epochs, values = run.train_series("images_per_second")
    if len(values) < 2:
        return None
    figure, axes = style.new_axes(height=2.7)
    draw_series(axes, epochs, values, "images per second", style.INK)
    axes.get_lines()[-1].set_label("_")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: grouped(value))
    middle = float(np.nanmedian(values))
    described = [f"median {grouped(middle)} images per second"]
    caption = f"Training images per second; median {grouped(middle)}."
    seconds = run.summary.get("wall_seconds")
    if isinstance(seconds, dict) and isinstance(seconds.get("train"), (int, float)):
        caption += f" Training took {duration(float(seconds['train']))}."
    return _finish(figure, axes, "Throughput", described, caption)


def _finish(figure: Figure, axes: Axes, title: str, described: list[str], caption: str) -> Plot:
    epoch_axis(axes)
    style.legend_above(axes)
    alt = f"{title} over epochs: {'; '.join(described)}."
    return Plot(title, style.to_svg(figure), alt, caption)


def _layers(run: Run) -> list[str]:
    keys = dict.fromkeys(key for line in run.train for key in line if key.startswith("invariance/"))
    return [key.removeprefix("invariance/") for key in keys]


def _sum_of_layers(run: Run, layers: list[str]) -> tuple[Numbers, Numbers]:
    series = [run.train_series(f"invariance/{layer}") for layer in layers]
    epochs = series[0][0]
    complete = [values for at, values in series if np.array_equal(at, epochs)]
    return epochs, np.sum(complete, axis=0)


def _thin(length: int) -> Numbers:
    # Every k-th point; the last one always.
    stride = max(1, -(-length // _MAX_POINTS))
    keep = np.zeros(length, dtype=bool)
    keep[::stride] = True
    keep[-1:] = True
    return keep


def _last(values: Numbers) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")
