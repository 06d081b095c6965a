"""How images are cropped, scaled and mirrored; the same for every loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.data.plan import BatchPlan, seeded_generator

AREA = (0.08, 1.0)
"""Share of the image that a random resized crop covers."""

RATIO = (3 / 4, 4 / 3)
"""Width over height of a random resized crop."""

ATTEMPTS = 10
"""Crops that are tried before the largest one in the middle is taken."""

EVALUATED = 7 / 8
"""Share of the shorter side that evaluation looks at: 224 of 256 pixels."""

Kind = Literal["pad", "resized"]
Boxes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shift:
    """What is cut out of images that keep their size, which are arrays already.

    Args:
        padding: pixels of zeros around the image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images horizontally.
    """

    padding: int = 0
    flip: bool = False

    def offsets(self, plan: BatchPlan, epoch: int, number: int) -> Tensor:
        """Where to crop and what to mirror in this rank's share of a batch, for
        :func:`arat_kernels.crop_flip.crop_flip`.

        The draws belong to the places of the whole batch, whatever the number of ranks.

        Returns:
            (N, 3), int32, on the CPU: first row and column of the crop in the padded image, and 1
            to mirror it.
        """
        num_samples, share = plan.size(number), plan.share(number)
        if not self.padding and not self.flip:
            return torch.zeros(num_samples, 3, dtype=torch.int32)[share]
        generator = seeded_generator(plan.seed, epoch, number)
        corner = torch.randint(2 * self.padding + 1, (2, num_samples), generator=generator)
        mirror = (torch.rand(num_samples, generator=generator) < 0.5) & self.flip
        return torch.stack([*corner, mirror.to(torch.int64)], dim=1).int()[share]


NO_SHIFT = Shift()
"""Images as they are."""


@dataclass(frozen=True)
class Framing:
    """What is cut out of an image of any size: a square.

    Args:
        size: height and width of the result, in pixels, >= 1.
        kind: "pad" cuts out size × size pixels; where the image is smaller, zeros surround it.
            "resized" scales a part of the image, of any size, to size × size.
        random: training: a random place, for "resized" a random size and shape too; else the
            centre.
        padding: "pad" with ``random``: pixels of zeros around the image before the crop.
        flip: mirror half of the images.
        augment: RandAugment of every crop, by PyTorch's loader.

    Source: the random resized crop of Szegedy et al., CVPR 2015 (arXiv 1409.4842), section 6.
    """

    NUM_DRAWS: ClassVar[int] = 3 + 2 * ATTEMPTS
    """Random numbers that place one image."""

    size: int
    kind: Kind = "pad"
    random: bool = False
    padding: int = 0
    flip: bool = False
    augment: bool = False

    def draw(self, plan: BatchPlan, epoch: int, number: int) -> Tensor:
        """Random numbers of this rank's share of a batch, (N, NUM_DRAWS), float64, in [0, 1).

        They belong to the places of the whole batch, and are 0 where nothing is random.
        """
        shape = (plan.size(number), self.NUM_DRAWS)
        if not (self.random or self.flip):
            return torch.zeros(shape, dtype=torch.float64)[plan.share(number)]
        generator = seeded_generator(plan.seed, epoch, number)
        return torch.rand(shape, generator=generator, dtype=torch.float64)[plan.share(number)]

    def offsets(self, plan: BatchPlan, epoch: int, number: int) -> Tensor:
        """As :meth:`Shift.offsets`, of images of ``size`` pixels: the same crops as of their files,
        kind "pad"."""
        draws = self.draw(plan, epoch, number)
        sizes = [self.size] * len(draws)
        boxes, mirror = self.place(sizes, sizes, draws)
        corners = boxes[:, :2] + self.padding
        return torch.from_numpy(np.concatenate([corners, mirror[:, None]], 1)).int()

    def place(
        self, heights: npt.ArrayLike, widths: npt.ArrayLike, draws: Tensor
    ) -> tuple[Boxes, npt.NDArray[np.bool_]]:
        """Where to cut and what to mirror.

        Args:
            heights: of the images (N,), in pixels.
            widths: of the images (N,), in pixels.
            draws: (N, NUM_DRAWS), from :meth:`draw`.

        Returns:
            (N, 4) boxes: first row, first column, height and width; of kind "pad" they can reach
            beyond the image; and (N,) whether to mirror.
        """
        u = draws.numpy()
        h, w = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        mirror = u[:, 2] < 0.5 if self.flip else np.zeros(len(h), np.bool_)
        if self.kind == "resized":
            boxes = self._resized(h, w, u) if self.random else self._middle(h, w)
        else:
            size = np.full(len(h), self.size)
            rows, columns = (
                self._random_start(length, u[:, axis]) if self.random else self._centre(length)
                for axis, length in enumerate((h, w))
            )
            boxes = np.stack([rows, columns, size, size], 1)
        return boxes, mirror

    def _centre(self, length: Boxes) -> Boxes:
        """Where a centred crop starts, as torchvision's; negative for an image that is smaller."""
        inside = np.round((length - self.size) / 2).astype(np.int64)
        return np.where(length >= self.size, inside, -((self.size - length) // 2))

    def _random_start(self, length: Boxes, u: npt.NDArray[np.float64]) -> Boxes:
        """Where a crop of the padded image starts, counted from the image itself."""
        padding = self.padding + np.maximum(self.size - length - 2 * self.padding, 0)
        places = length + 2 * padding - self.size + 1
        start: Boxes = (u * places).astype(np.int64) - padding
        return start

    def _resized(self, h: Boxes, w: Boxes, u: npt.NDArray[np.float64]) -> Boxes:
        area = (h * w)[:, None] * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 3 : 3 + ATTEMPTS])
        low, high = np.log(RATIO[0]), np.log(RATIO[1])
        ratio = np.exp(low + (high - low) * u[:, 3 + ATTEMPTS :])
        widths = np.round(np.sqrt(area * ratio)).astype(np.int64)
        heights = np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = (widths <= w[:, None]) & (heights <= h[:, None]) & (widths > 0) & (heights > 0)
        first = fits.argmax(1)
        rows = np.arange(len(h))
        # The largest crop in the middle whose shape is allowed.
        widest = np.minimum(w, np.round(h * RATIO[1])).astype(np.int64)
        highest = np.minimum(h, np.round(w / RATIO[0])).astype(np.int64)
        found = fits.any(1)
        width = np.where(found, widths[rows, first], np.maximum(widest, 1))
        height = np.where(found, heights[rows, first], np.maximum(highest, 1))
        top = np.where(found, (u[:, 0] * (h - height + 1)).astype(np.int64), (h - height) // 2)
        left = np.where(found, (u[:, 1] * (w - width + 1)).astype(np.int64), (w - width) // 2)
        return np.stack([top, left, height, width], 1)

    def _middle(self, h: Boxes, w: Boxes) -> Boxes:
        side = np.maximum(np.round(np.minimum(h, w) * EVALUATED).astype(np.int64), 1)
        return np.stack([(h - side) // 2, (w - side) // 2, side, side], 1)
