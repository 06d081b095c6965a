"""Images in arrays, in memory or left on disk, and .npy files, of which nothing is unpickled."""

from __future__ import annotations

import math
import mmap
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

HIGHEST_LABEL = 2**63 - 1

# What numpy raises for a damaged .npy file, whose header it evaluates as a Python literal.
_DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)


class Rows(Protocol):
    """Images of one size by number.

    Attributes:
        shape: (num_samples, height, width, channels).
    """

    shape: tuple[int, int, int, int]

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""


class MappedRows:
    """The images of an .npy file, (num_samples, height, width, channels), uint8, left on disk.

    A process keeps none of the pages it has read, so that its memory does not grow with the file.

    Args:
        path: the file, as ``numpy.save`` writes it.

    Raises:
        ValueError: it holds something else, or another number of bytes than its header promises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.shape, self._offset = read_header(file, path, path.stat().st_size)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_RANDOM)
        pixels: Pixels = np.ndarray(self.shape, np.uint8, self._map, self._offset)
        taken = pixels[index]
        del pixels
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return taken


class ArrayRows:
    """The images of an array in memory.

    Args:
        pixels: (num_samples, height, width, channels), uint8.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3])

    @property
    def images(self) -> Tensor:
        """All images, (num_samples, C, H, W), uint8; the same memory."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        return self.pixels[index]


class JoinedRows:
    """Several arrays, one behind the other.

    Args:
        parts: images of one shape.

    Raises:
        ValueError: the images of one part are of another shape than those of the first.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        for part in parts:
            if part.shape[1:] != parts[0].shape[1:]:
                sizes = ("x".join(map(str, rows.shape[1:])) for rows in (parts[0], part))
                raise ValueError(f"images of {' and of '.join(sizes)} cannot be mixed")
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        taken = np.empty((len(index), *self.shape[1:]), np.uint8)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number, part in enumerate(self.parts):
            own = owner == number
            if own.any():
                taken[own] = part.take(index[own] - self._starts[number])
        return taken


class SelectedRows:
    """Some of the images of an array.

    Args:
        rows: all of them.
        index: (N,), int64: those that are meant, in order.
    """

    def __init__(self, rows: Rows, index: Index) -> None:
        self.rows = rows
        self.index = index
        self.shape = (len(index), *rows.shape[1:])

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        return self.rows.take(self.index[index])


@dataclass(frozen=True)
class Images:
    """Images of one size with their labels.

    Attributes:
        rows: the images.
        labels: (num_samples,), int64.
        folder: where they come from, for messages.
    """

    rows: Rows
    labels: Tensor
    folder: Path | None = None

    @classmethod
    def of_pixels(cls, pixels: Pixels, labels: Tensor) -> Images:
        """Images (num_samples, height, width, channels) in memory, and labels, of any integers."""
        return cls(ArrayRows(pixels), labels.to(torch.int64))

    def __len__(self) -> int:
        return self.rows.shape[0]

    def name(self, index: int) -> str:
        """What one image is called in messages."""
        return f"{self.folder}: image {index}"

    def image(self, index: int) -> Pixels:
        """One image as RGB: (height, width, 3)."""
        pixels = self.rows.take(np.array([index]))[0]
        return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

    def subset(self, index: Tensor) -> Images:
        """The images ``index`` (N,), int64, in that order."""
        chosen = index.numpy()
        rows: Rows = SelectedRows(self.rows, chosen)
        if isinstance(self.rows, ArrayRows):
            rows = ArrayRows(self.rows.pixels[chosen])
        return Images(rows, self.labels[index])


def read_header(file: IO[bytes], path: Path, size: int) -> tuple[tuple[int, int, int, int], int]:
    """What the images of an open .npy file are.

    Args:
        file: is left at the first byte of the images.
        path: for messages.
        size: of the file, in bytes.

    Returns:
        their shape (num_samples, height, width, channels), and their first byte.

    Raises:
        ValueError: it holds something else, no image, or less or more than its header promises.
    """
    lib: Any = np.lib.format
    try:
        read = lib.read_array_header_1_0 if lib.read_magic(file) == (1, 0) else None
        shape, fortran, dtype = (read or lib.read_array_header_2_0)(file)
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected an .npy array, got {error}") from error
    if len(shape) != 4 or dtype != np.uint8 or fortran or 0 in shape:
        raise ValueError(
            f"{path}: expected images (num_samples, height, width, channels) uint8, at least one "
            f"image, got {shape} {dtype}"
        )
    offset = file.tell()
    expected = offset + math.prod(shape)
    if size != expected:
        raise ValueError(f"{path}: expected {expected:,} bytes of images, got {size:,}")
    return shape, offset


def read_labels(file: IO[bytes], path: Path, number: int) -> Tensor:
    """The labels of an open .npy file.

    Args:
        file: is read to its end.
        path: for messages.
        number: of labels that are expected, >= 1.

    Returns:
        labels (number,), int64, >= 0.

    Raises:
        ValueError: it holds something else, or is cut short.
    """
    lib: Any = np.lib.format
    try:
        y = lib.read_array(file, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected an .npy array of labels, got {error}") from error
    # At its end the checksum of a member of an .npz file is compared.
    if file.read(1):
        raise ValueError(f"{path}: expected {number} labels, got more bytes")
    if y.shape != (number,) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{path}: expected {number} integer labels, one for each image, got {y.dtype} of shape "
            f"{y.shape}"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > HIGHEST_LABEL:
        raise ValueError(f"{path}: expected labels in [0, 2^63), got {low} to {high}")
    return torch.from_numpy(y.astype(np.int64))
