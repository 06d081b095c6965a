"""Images beside their adversarial versions."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib import image as matplotlib_image
from numpy.typing import NDArray

from arat_fast.report.run import Examples

MAX_SHOWN = 48


@dataclass(frozen=True)
class Picture:
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


@dataclass(frozen=True)
class Card:
    """One example: its label, and the clean image, the attacked one and the difference."""

    label: str
    pictures: tuple[Picture, Picture, Picture]


def cards(examples: Examples) -> list[Card]:
    """The first examples, as many as a page shows."""
    half = magnification(examples)
    found = []
    for k in range(min(len(examples), MAX_SHOWN)):
        label = int(examples.y[k])
        delta = examples.x_adv[k] - examples.x[k]
        read = [
            Picture(
                kind,
                to_png(images[k]),
                examples.classes[int(answers[k])],
                int(answers[k]) == label,
                float(confidence[k]),
            )
            for kind, images, answers, confidence in (
                ("clean", examples.x, examples.pred_clean, examples.prob_clean),
                ("attacked", examples.x_adv, examples.pred_adv, examples.prob_adv),
            )
        ]
        change = Picture("change", to_png(0.5 + half * delta))
        found.append(Card(examples.classes[label], (read[0], read[1], change)))
    return found


def largest_change(examples: Examples) -> float:
    """The largest change of any pixel, >= 0."""
    return float(np.abs(examples.x_adv - examples.x).max())


def magnification(examples: Examples) -> float:
    """The factor that makes the largest change half of the range from black to white."""
    largest = largest_change(examples)
    return 0.5 / largest if largest > 0 else 0.0


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
