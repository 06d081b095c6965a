"""One look for every plot: colours that stay apart for every eye, and SVG that needs nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from arat_fast.report.run import Numbers

# Okabe and Ito's palette, safe for colour-blind readers; every plot also tells its lines apart by
# dashes or markers.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
INK = "#1c2330"
GREY = "#5b6472"
LINE = "#d9dde3"

CLEAN = BLUE
ADVERSARIAL = VERMILLION
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
Dashes: TypeAlias = "str | tuple[int, tuple[int, ...]]"

DASHES: tuple[Dashes, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
)
MARKERS = ("o", "s", "D", "^", "v", "P")

# Any: the type of the keys differs between versions of matplotlib.
_PARAMETERS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    # Names come from files: a dollar sign in one is a dollar sign, not a formula.
    "text.parse_math": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    # Fixed, so that the same run gives the same file.
    "svg.hashsalt": "arat_fast",
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The shared matplotlib style; global settings are put back afterwards."""
    with matplotlib.rc_context(_PARAMETERS):
        yield


def new_axes(width: float = 5.0, height: float = 3.1) -> tuple[Figure, Axes]:
    """A figure of ``width`` by ``height`` inches with one pair of axes; call in the style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend_above(axes: Axes, num_columns: int = 2) -> None:
    """The legend above the axes, where it never hides a line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncol=num_columns,
            columnspacing=1.4,
            handlelength=2.4,
            borderaxespad=0.2,
        )


@dataclass(frozen=True)
class Plot:
    """A figure with what a reader needs to know of it.

    Attributes:
        title: heading.
        figure: drawn in the style.
        alt: what it shows, with its last values.
        caption: how to read it.
    """

    title: str
    figure: Figure
    alt: str
    caption: str

    def svg(self) -> bytes:
        """The figure as an SVG file, for light and for dark paper."""
        buffer = io.BytesIO()
        # Outside of the style, the names inside the file would be random.
        with plot_style():
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return buffer.getvalue()

    def write_png(self, file: BinaryIO) -> None:
        """Write the figure as a PNG file, its title in it."""
        self.figure.suptitle(self.title, fontsize=10.5, x=0.01, ha="left")
        self.figure.savefig(file, format="png", dpi=150)


def plot_text(text: str, limit: int = 28) -> str:
    """A name for a plot, cut in the middle where it is longer than ``limit``."""
    # Matplotlib leaves labels that begin with an underscore out of legends.
    text = text.lstrip("_") or "?"
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"


def as_percent(axes: Axes) -> None:
    """A vertical axis from 0 to 100 %."""
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def within_percent(axes: Axes) -> None:
    """Limits that reach no further than a mark's room beyond 0 and 100."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(max(left, -2), min(right, 102)), ylim=(max(bottom, -2), min(top, 102)))


def epoch_axis(axes: Axes) -> None:
    """A horizontal axis of epochs from 0 to the last one drawn, marked at whole ones."""
    last = float(axes.dataLim.intervalx[1])
    # Room for a mark at the last one.
    axes.set_xlim(0, 1.04 * last if np.isfinite(last) and last > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def running_mean(values: Numbers, window: int) -> Numbers:
    """Centred mean over ``window`` points, over what there is at the ends; NaN is left out."""
    if window <= 1 or len(values) == 0:
        return values
    present = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(present, values, 0.0), kernel, mode="same")
    number = np.convolve(present.astype(np.float64), kernel, mode="same")
    result = np.full(len(values), np.nan)
    np.divide(total, number, out=result, where=number > 0.5)
    return result


def color(index: int) -> str:
    """Colour of one of several; after six they come round again, darker."""
    shade = 0.55 ** (index // len(SERIES))
    red, green, blue = to_rgb(SERIES[index % len(SERIES)])
    return to_hex((shade * red, shade * green, shade * blue))


def marker(index: int) -> str:
    """Marker of one of several; where the colours come round again, the markers do not."""
    return MARKERS[(index + index // len(SERIES)) % len(MARKERS)]
