"""Encoded images by number: files in folders, members of tar shards."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Names of image files end in one of these, in any case."""

MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded. Pillow refuses about as many itself."""

OPEN_SHARDS = 128
"""Archives that are kept open by each :class:`TarImages` of a process; there can be thousands."""

# Pillow reports damage as any of these, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class EncodedImages(ABC):
    """Images as the bytes of their files.

    Attributes:
        labels: (num_samples,), int64.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one image.

        Raises:
            ValueError: they cannot be read; the message names the file.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """The file, for messages."""

    @abstractmethod
    def subset(self, index: Tensor) -> EncodedImages:
        """The images ``index`` (N,), int64, in that order."""

    def image(self, index: int) -> Pixels:
        """One image, as :func:`decode_image`."""
        return decode_image(self.read(index), self.name(index))


class FileImages(EncodedImages):
    """Image files.

    Args:
        samples: (file, label) of each image.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]]) -> None:
        self.samples = tuple(samples)
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)

    def read(self, index: int) -> bytes:
        """The bytes of one file."""
        path = self.samples[index][0]
        try:
            return path.read_bytes()
        except OSError as error:
            raise _unreadable(str(path), error) from error

    def name(self, index: int) -> str:
        """The path of one file."""
        return str(self.samples[index][0])

    def subset(self, index: Tensor) -> FileImages:
        """The files ``index`` (N,), int64, in that order."""
        return FileImages([self.samples[i] for i in index.tolist()])


class _Shard:
    """An archive to read from at any place, by any thread and by a process that was forked: none
    moves another's position. Closed when it is used no more."""

    _file: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        if hasattr(os, "pread"):
            self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on; fewer where the file ends before."""
        if self._file is not None:
            return os.pread(self._file, size, start)
        # Windows.
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)


class TarImages(EncodedImages):
    """Members of tar archives, read where they lie.

    Args:
        shards: the archives.
        members: (num_samples, 3), int64: archive, first byte and number of bytes of each image.
        names: of the members, without their suffix.
        labels: (num_samples,), int64.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        members: npt.NDArray[np.int64],
        names: Sequence[str],
        labels: Tensor,
    ) -> None:
        self.shards = tuple(shards)
        self.members = members
        self.names = tuple(names)
        self.labels = labels
        self._open = lru_cache(OPEN_SHARDS)(_Shard)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _open=lru_cache(OPEN_SHARDS)(_Shard))

    def read(self, index: int) -> bytes:
        """The bytes of one member."""
        shard, start, size = self.members[index].tolist()
        try:
            content = self._open(self.shards[shard]).read(start, size)
        except OSError as error:
            raise _unreadable(self.name(index), error) from error
        if len(content) != size:
            raise ValueError(
                f"{self.name(index)}: expected {size} bytes, got {len(content)}: the archive was "
                "cut since it was listed"
            )
        return content

    def name(self, index: int) -> str:
        """Archive and member."""
        return f"{self.shards[int(self.members[index, 0])]}: {self.names[index]}"

    def subset(self, index: Tensor) -> TarImages:
        """The members ``index`` (N,), int64, in that order."""
        return TarImages(
            self.shards,
            self.members[index.numpy()],
            [self.names[i] for i in index.tolist()],
            self.labels[index],
        )


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """Height and width of an encoded image, from its header.

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        ValueError: it is no image, or one of more than ``MAX_PIXELS`` pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except _DAMAGE as error:
        raise _unreadable(name, error) from error
    _check_pixels(height, width, name)
    return height, width


def decode_image(content: bytes, name: str) -> Pixels:
    """Decode an image as RGB: (height, width, 3); alpha is dropped, 16 bits become 8.

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        ValueError: it is cut short or no image, or has more than ``MAX_PIXELS`` pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_pixels(image.height, image.width, name)
            if image.mode.startswith("I"):
                # Pillow would cut 16 bits off at 255.
                grey = np.round(np.asarray(image, np.float64) / 257).clip(0, 255)
                return np.repeat(grey.astype(np.uint8)[:, :, None], 3, 2)
            return np.array(image.convert("RGB"))
    except _DAMAGE as error:
        raise _unreadable(name, error) from error


def _check_pixels(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{name}: an image of {height} x {width} pixels, expected at most {MAX_PIXELS:,} "
            "pixels; scale it down first"
        )


def _unreadable(name: str, error: BaseException) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith(f"{name}: "):
        return error
    reason = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        reason = "its format is unknown"
    return ValueError(f"{name}: expected an image file, but reading it fails: {reason}")


def default_workers() -> int:
    """As many as there are cores for this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def unreadable(
    source: EncodedImages, progress: Callable[[str, int, int], None] | None = None
) -> dict[int, str]:
    """Decode every image; what is wrong with those that cannot be, by number.

    Args:
        source: the images.
        progress: told what is done, how many images of it and of how many.
    """

    def check(index: int) -> str:
        try:
            source.image(index)
        except ValueError as error:
            return str(error)
        return ""

    bad = {}
    with ThreadPoolExecutor(default_workers()) as pool:
        for index, reason in enumerate(pool.map(check, range(len(source)))):
            if reason:
                bad[index] = reason
            if progress is not None:
                progress("checking files", index + 1, len(source))
    return bad


def decode_all(source: EncodedImages, size: int, expected: str) -> Pixels:
    """Decode images of one size, in several threads.

    Args:
        source: the images.
        size: their height and width.
        expected: who expects that size, for the message.

    Returns:
        (num_samples, size, size, 3).

    Raises:
        ValueError: an image is of another size, or cannot be decoded.
    """
    pixels = np.empty((len(source), size, size, 3), np.uint8)

    def decode(index: int) -> None:
        image = source.image(index)
        if image.shape[:2] != (size, size):
            raise ValueError(
                f"{source.name(index)}: {expected} images of {size} x {size} pixels, got "
                f"{image.shape[0]} x {image.shape[1]}"
            )
        pixels[index] = image

    with ThreadPoolExecutor(default_workers()) as pool:
        for _ in pool.map(decode, range(len(source))):
            pass
    return pixels
