"""Images beside their adversarial versions."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from matplotlib import image as matplotlib_image
from numpy.typing import NDArray

from arat_fast.report.run import Examples

MAX_SHOWN = 48


class Picture(NamedTuple):
    """One image of an example.

    Attributes:
        kind: "clean", "attacked" or "change".
        png: the image file.
        answer: the network's, None for a change.
        right: whether that is the label.
        confidence: in the answer, in [0, 1].
    """

    kind: str
    png: bytes
    answer: str | None = None
    right: bool = False
    confidence: float = 0.0


class Card(NamedTuple):
    """One example: its label, and the clean image, the attacked one and the difference."""

    label: str
    pictures: list[Picture]


def cards(examples: Examples) -> list[Card]:
    """The first examples, as many as a page shows.

    The change is magnified so that the largest one is half of the range from black to white.
    """
    largest = largest_change(examples)
    factor = 0.5 / largest if largest > 0 else 0.0
    answers = (
        ("clean", examples.x, examples.pred_clean, examples.prob_clean),
        ("attacked", examples.x_adv, examples.pred_adv, examples.prob_adv),
    )
    found = []
    for k, label in enumerate(examples.y[:MAX_SHOWN]):
        pictures = [
            Picture(kind, to_png(x[k]), examples.classes[p[k]], bool(p[k] == label), float(prob[k]))
            for kind, x, p, prob in answers
        ]
        change = to_png(0.5 + factor * (examples.x_adv[k] - examples.x[k]))
        found.append(Card(examples.classes[label], [*pictures, Picture("change", change)]))
    return found


def largest_change(examples: Examples) -> float:
    """The largest change of any pixel, >= 0."""
    return float(np.abs(examples.x_adv - examples.x).max())


def to_png(pixels: NDArray[np.floating]) -> bytes:
    """An image (C, H, W) in [0, 1] as a PNG file; one channel is grey, three are RGB.

    Another number of channels is shown as the mean over them.
    """
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.mean(axis=0, keepdims=True)
    levels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    rgb = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
    buffer = io.BytesIO()
    matplotlib_image.imsave(buffer, np.ascontiguousarray(rgb), format="png")
    return buffer.getvalue()
