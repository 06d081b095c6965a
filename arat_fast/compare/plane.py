"""The robustness-accuracy plane of a comparison."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from arat_fast.compare.results import Results, Row
from arat_fast.compare.tables import column_name
from arat_fast.report import style

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""

_FAR = 1.5
_SWEEPS = 6
_RADII = (9.0, 14.0, 20.0, 28.0, 38.0, 52.0, 70.0)
_ANGLES = tuple(math.radians(angle) for angle in range(0, 360, 15))


@dataclass(frozen=True)
class _Point:
    row: Row
    color: str
    marker: str
    robust: tuple[float, ...]
    clean: tuple[float, ...]

    @property
    def centre(self) -> tuple[float, float]:
        return float(np.mean(self.robust)), float(np.mean(self.clean))

    @property
    def spread(self) -> tuple[float, float]:
        if len(self.robust) < 2:
            return 0.0, 0.0
        return float(np.std(self.robust, ddof=1)), float(np.std(self.clean, ddof=1))


def plane(results: Results) -> Figure | None:
    """Clean accuracy over robust accuracy, every seed and the means, with lines of equal sum.

    Rows far to the left of the others, as ordinary training is, are named at the edge instead of
    squeezing the rest. Robust is AutoAttack where it was run, PGD else.

    Args:
        results: of the comparison.

    Returns:
        The figure; None where no row has both accuracies.
    """
    metric = robust_metric(results)
    if metric is None:
        return None
    points = _points(results, metric)
    near, far = _split_far(points)
    with style.plot_style():
        figure = Figure(figsize=(7.0, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(f"{column_name(metric)} accuracy, %")
        axes.set_ylabel("clean accuracy, %")
        for point in near:
            _draw(axes, point)
        _limits(axes, near)
        written = [*_iso_sums(axes), *_name_far(axes, far)]
        figure.draw_without_rendering()
        # From here on the layout must not move, or the labels would not be where they were put.
        figure.set_layout_engine("none")
        _label(figure, axes, near, written)
    return figure


def describe_plane(results: Results) -> str:
    """The plane in words, for those who cannot see it."""
    metric = robust_metric(results)
    if metric is None:
        return "No accuracies yet."
    described = [
        f"{point.row.title} clean {point.centre[1]:.1f}, robust {point.centre[0]:.1f}"
        for point in _points(results, metric)
    ]
    return f"Clean over {column_name(metric)} accuracy in percent: {'; '.join(described)}."


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
    scale: float = 1.0,
) -> list[tuple[float, float]]:
    """Where to write a label near each anchor, over no other label and no mark if there is room.

    Every label goes in turn to the cheapest of the places around its anchor, several times over.

    Args:
        anchors: points that are named, in pixels.
        sizes: width and height of each label, in pixels.
        obstacles: boxes not to write over.
        frame: box to stay in.
        scale: pixels per point of type: the distances are in points.

    Returns:
        Lower left corner of each label, in pixels.
    """
    # A crowd is labelled from outside, where the room is.
    middle = np.mean(np.array(anchors, dtype=np.float64).reshape(-1, 2), axis=0)
    boxes: list[Box | None] = [None] * len(anchors)
    order = sorted(range(len(anchors)), key=lambda i: -math.dist(anchors[i], middle))
    for _ in range(_SWEEPS):
        before = list(boxes)
        for index in order:
            others = [b for i, b in enumerate(boxes) if b is not None and i != index]
            best = math.inf
            for box in _places(anchors[index], sizes[index], scale):
                cost = _cost(box, anchors[index], others, obstacles, frame, scale)
                if cost < best:
                    best, boxes[index] = cost, box
        if boxes == before:
            break
    return [(box[0], box[1]) for box in boxes if box is not None]


def _places(anchor: tuple[float, float], size: tuple[float, float], scale: float) -> list[Box]:
    width, height = size
    places = []
    for radius in _RADII:
        for angle in _ANGLES:
            # The nearest point of the label, not its middle, lies on the circle.
            x = anchor[0] + scale * radius * math.cos(angle)
            y = anchor[1] + scale * radius * math.sin(angle)
            left = x - width * (1 - math.cos(angle)) / 2
            bottom = y - height * (1 - math.sin(angle)) / 2
            places.append((left, bottom, left + width, bottom + height))
    return places


def _cost(
    box: Box,
    anchor: tuple[float, float],
    others: Sequence[Box],
    obstacles: Sequence[Box],
    frame: Box,
    scale: float,
) -> float:
    area = max((box[2] - box[0]) * (box[3] - box[1]), 1.0)
    inside = overlap(box, frame) / area
    cost = 100 * (1 - inside)
    cost += 40 * sum(overlap(box, other) for other in others) / area
    # A mark is small: what counts is that it is covered, not how much of the label covers it.
    for mark in obstacles:
        shared = overlap(box, mark)
        if shared:
            cost += 4 + 8 * shared / max((mark[2] - mark[0]) * (mark[3] - mark[1]), 1.0)
    nearest = (
        min(max(anchor[0], box[0]), box[2]),
        min(max(anchor[1], box[1]), box[3]),
    )
    return cost + math.dist(anchor, nearest) / (20 * scale)


def overlap(a: Box, b: Box) -> float:
    """Common area of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def robust_metric(results: Results) -> str | None:
    """The accuracy that the plane has as robust: AutoAttack where it was run, PGD else."""
    pgd = [metric for metric in results.metrics if metric.startswith("pgd")]
    for metric in ("autoattack", *pgd):
        if _points(results, metric):
            return metric
    return None


def _points(results: Results, metric: str) -> list[_Point]:
    points = []
    for index, row in enumerate(results.rows):
        clean, robust = row.spreads.get("clean"), row.spreads.get(metric)
        # A seed that measured only one of them has no point.
        if clean is None or robust is None or len(clean.values) != len(robust.values):
            continue
        color = style.SERIES[index % len(style.SERIES)]
        marker = style.MARKERS[(index + index // len(style.SERIES)) % len(style.MARKERS)]
        points.append(_Point(row, color, marker, robust.values, clean.values))
    return points


def _split_far(points: Sequence[_Point]) -> tuple[list[_Point], list[_Point]]:
    """The points of the picture, and those so far to the left that they would squeeze it."""
    ordered = sorted(points, key=lambda point: point.centre[0])
    for index in range(1, len(ordered) - 1):
        gap = ordered[index].centre[0] - ordered[index - 1].centre[0]
        width = ordered[-1].centre[0] - ordered[index].centre[0]
        if gap > _FAR * max(width, 2.0) and len(ordered) - index > index:
            far = ordered[:index]
            return [point for point in points if point not in far], far
    return list(points), []


def _draw(axes: Axes, point: _Point) -> None:
    x, y = point.centre
    x_std, y_std = point.spread
    hollow = point.row.planned.method.ablation
    axes.plot(
        point.robust,
        point.clean,
        linestyle="",
        marker=point.marker,
        markersize=3.2,
        color=point.color,
        alpha=0.45,
        markeredgewidth=0,
        zorder=3,
    )
    axes.errorbar(
        [x],
        [y],
        xerr=[x_std] if x_std else None,
        yerr=[y_std] if y_std else None,
        color=point.color,
        marker=point.marker,
        markersize=8,
        markerfacecolor="white" if hollow else point.color,
        markeredgewidth=1.5,
        linewidth=1.0,
        capsize=2.5,
        zorder=4,
    )


def _limits(axes: Axes, points: Sequence[_Point]) -> None:
    """Room for the labels around the marks, hardly beyond 0 and 100, and at least two points of
    accuracy."""
    for values, spreads, set_limits in (
        ([p.robust for p in points], [p.spread[0] for p in points], axes.set_xlim),
        ([p.clean for p in points], [p.spread[1] for p in points], axes.set_ylim),
    ):
        low = min(min(v) - s for v, s in zip(values, spreads, strict=True))
        high = max(max(v) + s for v, s in zip(values, spreads, strict=True))
        margin = max(0.14 * (high - low), 0.5)
        edge = min(margin / 4, 2.0)
        set_limits(max(low - margin, -edge), min(high + margin, 100 + edge))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        # No mark outside of 0 to 100, though the margin may reach over it.
        axis.set_major_formatter(lambda value, _: f"{value:g}" if 0 <= value <= 100 else "")


def _iso_sums(axes: Axes) -> list[Text]:
    written: list[Text] = []
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(
        x_low + y_low, x_high + y_high
    ):
        x_from, x_to = max(x_low, total - y_high), min(x_high, total - y_low)
        if x_to - x_from < 0.08 * (x_high - x_low):
            continue
        axes.plot(
            [x_from, x_to],
            [total - x_from, total - x_to],
            color=style.LINE,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        # Written at the lower end of the line, inside the axes.
        note = axes.annotate(
            f"sum {total:g}",
            (x_to, total - x_to),
            xytext=(-3, 3),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="bottom",
            fontsize=7,
            color=style.GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            zorder=2,
        )
        written.append(note)
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)
    return written


def _label(figure: Figure, axes: Axes, points: Sequence[_Point], written: Sequence[Text]) -> None:
    """Write each method's name beside its mark, with a line to it where it had to go far."""
    scale = figure.dpi / 72
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    transform = axes.transData.transform
    texts = [axes.text(0, 0, _name(point.row), fontsize=8.5, zorder=6) for point in points]
    extents = [text.get_window_extent(renderer) for text in texts]
    anchors = [(float(x), float(y)) for x, y in (transform(point.centre) for point in points)]
    obstacles = [_around(anchor, 6 * scale) for anchor in anchors]
    for text in written:
        box = text.get_window_extent(renderer)
        obstacles.append((box.x0, box.y0, box.x1, box.y1))
    for point in points:
        seeds = zip(point.robust, point.clean, strict=True)
        obstacles += [_around(transform(seed), 2 * scale) for seed in seeds]
        (x, y), (dx, dy) = point.centre, point.spread
        for start, end in (((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))):
            (left, bottom), (right, top) = transform(start), transform(end)
            obstacles.append((left - scale, bottom - scale, right + scale, top + scale))
    frame = axes.get_window_extent(renderer)
    corners = place_labels(
        anchors,
        [(extent.width + 6 * scale, extent.height + 2 * scale) for extent in extents],
        obstacles,
        (frame.x0, frame.y0, frame.x1, frame.y1),
        scale,
    )
    back = axes.transData.inverted().transform
    for text, extent, anchor, corner, point in zip(
        texts, extents, anchors, corners, points, strict=True
    ):
        left, bottom = corner[0] + 3 * scale, corner[1] + scale
        x, y = back((left, bottom))
        text.set_position((float(x), float(y)))
        text.set_verticalalignment("bottom")
        nearest = (
            min(max(anchor[0], left), left + extent.width),
            min(max(anchor[1], bottom), bottom + extent.height),
        )
        if math.dist(nearest, anchor) > 16 * scale:
            axes.plot(
                *zip(back(nearest), point.centre, strict=True),
                color=style.GREY,
                linewidth=0.6,
                zorder=2,
            )


def _name(row: Row) -> str:
    """The row's title; one of the ablation says what it adds to."""
    title = row.title
    return style.plot_text(f"naive {title}" if title.startswith("+") else title, 32)


def _around(centre: Any, radius: float) -> Box:
    x, y = float(centre[0]), float(centre[1])
    return x - radius, y - radius, x + radius, y + radius


def _name_far(axes: Axes, points: Sequence[_Point]) -> list[Text]:
    lines = [
        f"◁ {_name(point.row)}: clean {point.centre[1]:.1f}, robust {point.centre[0]:.1f}"
        for point in points
    ]
    if not lines:
        return []
    note = axes.text(
        0.015,
        0.015,
        "\n".join(lines),
        transform=axes.transAxes,
        fontsize=8,
        color=style.GREY,
        verticalalignment="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        zorder=5,
    )
    return [note]
