"""Images in arrays, in memory or left on disk, and .npy files, of which nothing is unpickled."""

from __future__ import annotations

import math
import mmap
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.datasets.decoding import Pixels

Index = npt.NDArray[np.int64]

HIGHEST_LABEL = 2**63 - 1

CHANNELS = (1, 3)
"""What an axis of images is the channels by."""

_SAMPLED = 1000
"""Images of uint8 that are looked at before they are read as levels."""

NPY: Any = np.lib.format

# What numpy raises for a damaged .npy file, whose header it evaluates as a Python literal.
DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)


class Rows(Protocol):
    """Images of one size by number: an array, or what is read as one.

    Attributes:
        shape: (num_samples, height, width, channels).
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""


@dataclass(frozen=True)
class Stored:
    """How the images of an .npy file lie in it, and what they are read as.

    Attributes:
        shape: of the array in the file.
        dtype: of its numbers.
        fortran: the first axis is the fastest.
        offset: first byte of its numbers.
        first: channels come before height and width.
        unit: its numbers are in [0, 1], rather than uint8's levels.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int
    first: bool = False
    unit: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def images(self) -> tuple[int, int, int, int]:
        """(num_samples, height, width, channels), as they are read."""
        number, *size = self.shape
        height, width, channels = size[1:] + size[:1] if self.first else (*size, 1)[:3]
        return number, height, width, 3 if channels == 4 else channels

    @property
    def plain(self) -> bool:
        """Whether what is read is what lies there."""
        return self.shape == self.images and self.dtype == np.uint8 and not self.fortran

    def view(self, memory: Any) -> npt.NDArray[Any]:
        """The numbers of a file that is mapped, as (num_samples, height, width, channels)."""
        stored: npt.NDArray[Any] = np.ndarray(
            self.shape, self.dtype, memory, self.offset, order="F" if self.fortran else "C"
        )
        if len(self.shape) == 3:
            return stored[..., None]
        return np.moveaxis(stored, 1, -1) if self.first else stored

    def pixels(self, numbers: npt.NDArray[Any]) -> Pixels:
        """What numbers of the file, (N, height, width, channels), are as uint8, without alpha."""
        numbers = numbers[..., : self.images[3]]
        if self.unit:
            numbers = np.round(numbers.astype(np.float32) * np.float32(255))
        return np.ascontiguousarray(numbers, np.uint8)

    def note(self) -> str:
        """What is converted, in words; empty for nothing."""
        said = []
        if self.first or len(self.shape) == 3:
            axes = "channels, height, width" if self.first else "height, width"
            said.append(f"(num_samples, {axes})")
        if self.shape[-3 if self.first else -1] == 4 and len(self.shape) == 4:
            said.append("an opaque fourth channel, which is dropped")
        if self.fortran:
            said.append("Fortran's order")
        if self.dtype != np.uint8:
            said.append(f"{self.dtype} in [0, {1 if self.unit else 255}]")
        return ", ".join(said)


class MappedRows:
    """The images of an .npy file, left on disk.

    A process keeps none of the pages it has read, so that its memory does not grow with the file.

    Args:
        path: the file, as ``numpy.save`` writes it.

    Raises:
        ValueError: it holds something else than :func:`read_header` takes, another number of bytes
            than its header promises, or values whose meaning is not certain.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        with path.open("rb") as file:
            self.stored = read_header(file, path, path.stat().st_size)
        self.shape = self.stored.images
        number = self.shape[0]
        some = np.unique(np.linspace(0, number - 1, min(number, _SAMPLED)).astype(np.int64))
        # Of uint8 a look at some is enough, others are right where each number is.
        looked_at = some if self.stored.dtype == np.uint8 else np.arange(number)
        parts = (
            self._numbers(part) for part in np.array_split(looked_at, -(-len(looked_at) // 256))
        )
        self.stored = settled(self.stored, parts, path)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def __getitem__(self, index: Index) -> Pixels:
        return self.stored.pixels(self._numbers(index))

    def _numbers(self, index: Index) -> npt.NDArray[Any]:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_RANDOM)
        numbers = self.stored.view(self._map)
        taken = numbers[index]
        del numbers
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return taken


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

    def __getitem__(self, index: Index) -> Pixels:
        taken = np.empty((len(index), *self.shape[1:]), np.uint8)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number, part in enumerate(self.parts):
            own = owner == number
            if own.any():
                taken[own] = part[index[own] - self._starts[number]]
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

    def __getitem__(self, index: Index) -> Pixels:
        return self.rows[self.index[index]]


@dataclass
class Images:
    """Images of one size with their labels.

    Attributes:
        rows: the images: an array (num_samples, height, width, channels), uint8, or what is read
            as one.
        labels: (num_samples,), int64.
        source: where they come from, for messages.
        note: what they are converted from; empty for nothing.
    """

    rows: Rows
    labels: Tensor
    source: Path | None = None
    note: str = ""

    @classmethod
    def mapped(cls, images: Path, labels: Path) -> Images:
        """The images of an .npy file, as :class:`MappedRows`, and their labels in another one."""
        rows = MappedRows(images)
        with labels.open("rb") as file:
            y = read_labels(file, labels, rows.shape[0])
        return cls(rows, y, images.parent, rows.stored.note())

    def __len__(self) -> int:
        return self.rows.shape[0]

    def name(self, index: int) -> str:
        """What one image is called in messages."""
        return f"{self.source}: image {index}"

    def image(self, index: int) -> Pixels:
        """One image as RGB: (height, width, 3)."""
        pixels = self.rows[np.array([index])][0]
        return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

    def subset(self, index: Tensor) -> Images:
        """The images ``index`` (N,), int64, in that order."""
        rows, chosen = self.rows, index.numpy()
        in_memory = isinstance(rows, np.ndarray)
        rows = rows[chosen] if in_memory else SelectedRows(rows, chosen)
        return replace(self, rows=rows, labels=self.labels[index])


def read_header(file: IO[bytes], path: Path, size: int) -> Stored:
    """How the images of an open .npy file lie in it; :func:`settled` says what they mean.

    Args:
        file: is left at the first byte of the images.
        path: for messages.
        size: of the file, in bytes.

    Raises:
        ValueError: it holds no numbers, no image, less or more than its header promises, or axes
            that are not certainly those of images.
    """
    try:
        read = NPY.read_array_header_1_0 if NPY.read_magic(file) == (1, 0) else None
        shape, fortran, dtype = (read or NPY.read_array_header_2_0)(file)
    except DAMAGE as error:
        raise ValueError(f"{path}: expected an .npy array, got {error}") from error
    stored = Stored(shape, dtype, fortran and len(shape) > 1, file.tell())
    if dtype.kind not in "uif" or dtype == np.int8:
        raise _uncertain(stored, path, "levels of uint8 are no such numbers")
    if 0 in shape:
        raise _uncertain(stored, path, "at least one image is expected")
    axis = _channel_axis(shape)
    if axis is None:
        raise _uncertain(stored, path, "which axis is which is not certain")
    stored = replace(stored, first=axis == 1)
    if size != stored.offset + stored.nbytes:
        raise ValueError(
            f"{path}: expected {stored.offset + stored.nbytes:,} bytes of images, got {size:,}"
        )
    return stored


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of the channels, 3 of grey images without any; None where it could be another."""
    if len(shape) == 3:
        return None if shape[2] in (*CHANNELS, 4) else 3
    if len(shape) != 4:
        return None
    first, last = shape[1], shape[3]
    if last in CHANNELS:
        return None if first in CHANNELS else 3
    if first in CHANNELS:
        return None if last == 4 else 1
    if (first == 4) == (last == 4):
        return None
    return 1 if first == 4 else 3


def settled(stored: Stored, parts: Iterable[npt.NDArray[Any]], path: Path) -> Stored:
    """What the numbers of images mean, by their values.

    Args:
        stored: how they lie.
        parts: images (N, height, width, channels).
        path: for messages.

    Raises:
        ValueError: some are neither in [0, 1] nor all levels in [0, 255], none reaches a quarter of
            white, or a fourth channel is not opaque.
    """
    low, high, whole, opaque = math.inf, -math.inf, True, math.inf
    for part in parts:
        if stored.dtype.kind == "f":
            if not np.isfinite(part).all():
                raise _uncertain(stored, path, "values are not finite")
            whole = whole and bool((part == np.floor(part)).all())
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if part.shape[3] == 4:
            opaque = min(opaque, float(part[..., 3].min()))
    got = f"values from {low:.9g} to {high:.9g}"
    unit = stored.dtype.kind == "f" and high <= 1
    white = 1 if unit else 255
    if low < 0 or high > 255 or not (unit or whole):
        raise _uncertain(stored, path, got)
    if 0 < high < white / 4:
        problem = f"{got}, of which {white} would be white: scale them up to it"
        raise _uncertain(stored, path, problem)
    if opaque not in (math.inf, white):
        raise _uncertain(stored, path, "a fourth channel that is no opaque alpha")
    return replace(stored, unit=unit)


def _uncertain(stored: Stored, path: Path, problem: str) -> ValueError:
    order = " in Fortran's order" if stored.fortran else ""
    return ValueError(
        f"{path}: expected images (num_samples, height, width, 1 or 3 channels), uint8, "
        f"got {stored.shape} {stored.dtype}{order}: {problem}"
    )


def read_labels(file: IO[bytes], path: Path, number: int) -> Tensor:
    """The labels of an open .npy file: one of each image, a column of them, or one-hot rows.

    Args:
        file: is read to its end.
        path: for messages.
        number: of labels that are expected, >= 1.

    Returns:
        labels (number,), int64, >= 0.

    Raises:
        ValueError: it holds something else, or is cut short.
    """
    try:
        y = NPY.read_array(file, allow_pickle=False)
    except DAMAGE as error:
        got = "objects of Python, which are never unpickled" if "Object" in str(error) else error
        raise ValueError(f"{path}: expected an .npy array of labels, got {got}") from error
    # At its end the checksum of a member of an .npz file is compared.
    if file.read(1):
        raise ValueError(f"{path}: expected {number} labels, got more bytes")
    got = f"{y.dtype} of shape {y.shape}"
    if y.shape == (number, 1):
        y = y[:, 0]
    elif y.ndim == 2 and len(y) == number and y.dtype.kind in "buif":
        if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
            raise ValueError(f"{path}: expected a label of each image, got {got}, not one-hot")
        if not y.any(0).all():
            raise ValueError(
                f"{path}: expected images of each class, got none of class {int(y.any(0).argmin())}"
            )
        y = y.argmax(1)
    certain = y.dtype.kind in "bui" or (
        y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.floor(y)).all())
    )
    if y.shape != (number,) or not certain:
        raise ValueError(f"{path}: expected {number} integer labels, one for each image, got {got}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > HIGHEST_LABEL:
        raise ValueError(f"{path}: expected labels in [0, 2^63), got {low} to {high}")
    return torch.from_numpy(y.astype(np.int64))
