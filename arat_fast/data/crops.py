"""From uint8 pixels to float32 batches: crop, mirror and convert, quickly on a CPU too."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.datasets.decoding import Pixels
from arat_kernels.crop_flip import crop_flip
from arat_kernels.implementation import Impl


class Buffers:
    """Memory for batches on the CPU, used again once nothing holds the batch that lay there.

    Fresh memory is cleared by the kernel page by page, which takes longer than what is computed
    into it here.
    """

    KEPT = 4
    """Batches whose memory is kept at most."""

    def __init__(self) -> None:
        # Of each the view that was last given away: the tensor and all that shares its memory keep
        # it alive.
        self._held: list[tuple[Pixels, weakref.ref[Any]]] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape and dtype, contiguous, its values unspecified."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            free = [
                place
                for place, (memory, user) in enumerate(self._held)
                if user() is None and len(memory) >= size
            ]
            place = min(free, key=lambda place: len(self._held[place][0]), default=None)
            memory = np.empty(size, np.uint8) if place is None else self._held.pop(place)[0]
            view = memory[:size]
            self._held = [*self._held[1 - self.KEPT :], (memory, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype).view(*shape)


def to_unit_range(pixels: Tensor, max_value: int, buffers: Buffers) -> Tensor:
    """Pixels as float32 in [0, 1], in one pass.

    Args:
        pixels: any shape, uint8 in [0, max_value].
        max_value: the uint8 value that stands for 1.0.
        buffers: where the result lies on a CPU.
    """
    if pixels.device.type == "cpu":
        out = buffers.empty(pixels.shape, torch.float32)
        # In this thread: PyTorch's others have gone to sleep since the last batch, and a small one
        # is converted before they wake. What loads files needs them for that.
        np.divide(
            pixels.numpy(),
            np.float32(max_value),
            out=out.numpy(),
            dtype=np.float32,
            casting="unsafe",
        )
        return out
    scale = pixels.new_full((), max_value, dtype=torch.float32)
    # By a tensor on the same device: by a number CUDA multiplies with the reciprocal.
    return torch.div(pixels, scale)


class CropFlip:
    """:func:`arat_kernels.crop_flip.crop_flip`; on a CPU the same values, faster.

    Args:
        padding: pixels of zeros on each side.
        max_value: the uint8 value that stands for 1.0.
        memory_format: of the result, channels_last or contiguous.
    """

    def __init__(self, padding: int, max_value: int, memory_format: torch.memory_format) -> None:
        self.padding = padding
        self.max_value = max_value
        self.memory_format = memory_format
        self._buffers = Buffers()
        # The images of the last batch, and with their border, whose zeros stay.
        self._chosen: Pixels = np.zeros(0, np.uint8)
        self._bordered: Pixels = np.zeros(0, np.uint8)
        self._lock = threading.Lock()

    def __call__(
        self, images: Tensor, index: Tensor, draws: Tensor, impl: Impl | None = None
    ) -> Tensor:
        """Gather, crop, mirror and convert.

        Args:
            images: (num_samples, C, H, W), uint8 in [0, max_value].
            index: samples (N,), int64 in [0, num_samples).
            draws: (N, 3), int32: first row and column of the crop in the padded image, and 1 to
                mirror it.
            impl: of the operation; None: on a CPU neither of them, but NumPy.

        Returns:
            (N, C, H, W), float32 in [0, 1].
        """
        if images.device.type != "cpu" or impl is not None:
            return crop_flip(
                images,
                index,
                padding=self.padding,
                offsets=draws,
                max_value=self.max_value,
                memory_format=self.memory_format,
                impl=impl,
            )
        # The definition gathers pixel by pixel, which takes a CPU twenty times as long.
        channels_last = self.memory_format == torch.channels_last
        pixels = (images.permute(0, 2, 3, 1) if channels_last else images).numpy()
        samples, offsets = index.numpy(), draws.numpy()
        with self._lock:
            crops = self._crop(self._take(pixels, samples), offsets)
            mirrored = offsets[:, 2].nonzero()[0]
            if len(mirrored):
                turned = torch.from_numpy(crops[mirrored]).flip(2 if channels_last else 3)
                crops[mirrored] = turned.numpy()
            x = to_unit_range(torch.from_numpy(crops), self.max_value, self._buffers)
        return x.permute(0, 3, 1, 2) if channels_last else x

    def _take(self, pixels: Pixels, samples: npt.NDArray[np.int64]) -> Pixels:
        """The chosen images, until the next are taken."""
        shape = (len(samples), *pixels.shape[1:])
        if self._chosen.shape[1:] != shape[1:] or len(self._chosen) < len(samples):
            self._chosen = np.empty(shape, np.uint8)
        chosen = self._chosen[: len(samples)]
        if pixels.flags.c_contiguous:
            # Numbers of samples come from a plan; with mode "raise" NumPy would copy them twice.
            np.take(pixels, samples, 0, out=chosen, mode="clip")
        else:
            chosen[:] = pixels[samples]
        return chosen

    def _crop(self, pixels: Pixels, offsets: npt.NDArray[np.int32]) -> Pixels:
        """One crop of each image, of the image's size.

        Args:
            pixels: (N, H, W, C) if the memory format is channels_last, else (N, C, H, W).
            offsets: (N, 3): first row and column in the image with its border; the rest is not
                read.
        """
        if not self.padding:
            return pixels
        # An image is planes of rows; from one of its pixels to the next it is ``step`` bytes.
        number, planes, height, width, step = *pixels.shape, 1
        if self.memory_format == torch.channels_last:
            number, planes, height, width, step = number, 1, planes, height, width
        border = 2 * self.padding
        shape = (number, planes, height + border, (width + border) * step)
        if self._bordered.shape[1:] != shape[1:] or len(self._bordered) < number:
            self._bordered = np.zeros(shape, np.uint8)
        row, plane = shape[3], shape[3] * shape[2]
        image = planes * plane
        # A row of an image or of a crop is one element of NumPy's, wherever it begins.
        element = np.dtype((np.void, width * step))
        inside: npt.NDArray[np.void] = np.ndarray(
            (number, planes, height),
            element,
            self._bordered.data,
            offset=self.padding * (row + step),
            strides=(image, plane, row),
        )
        rows = pixels.reshape(number, planes, height, width * step)
        inside[...] = rows.view(element)[..., 0]
        windows: npt.NDArray[np.void] = np.ndarray(
            (number, planes, border + 1, border + 1, height),
            element,
            self._bordered.data,
            strides=(image, plane, row, step, row),
        )
        crops = windows[np.arange(number), :, offsets[:, 0], offsets[:, 1]]
        return crops.view(np.uint8).reshape(pixels.shape)
