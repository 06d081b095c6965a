"""Encoded images by number: files in folders, members of tar shards."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.datasets.decoding import Pixels, decode_image


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

    @abstractmethod
    def num_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each image, (num_samples,); 0 where they cannot be read."""

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
            raise ValueError(f"{path}: it cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        """The path of one file."""
        return str(self.samples[index][0])

    def subset(self, index: Tensor) -> FileImages:
        """The files ``index`` (N,), int64, in that order."""
        return FileImages([self.samples[i] for i in index.tolist()])

    def num_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each file, (num_samples,); 0 where it cannot be read."""
        sizes = np.zeros(len(self), np.int64)
        for index, (path, _) in enumerate(self.samples):
            with suppress(OSError):
                sizes[index] = path.stat().st_size
        return sizes


class TarImages(EncodedImages):
    """Members of tar archives, read where they lie.

    Args:
        shards: the archives.
        members: (num_samples, 3), int64: archive, first byte and number of bytes of each image.
        names: of the members.
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

    def read(self, index: int) -> bytes:
        """The bytes of one member."""
        shard, start, size = self.members[index].tolist()
        try:
            # Opened each time: there can be thousands, and a file of Python's takes longer.
            descriptor = os.open(self.shards[shard], os.O_RDONLY)
            try:
                content = os.pread(descriptor, size, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ValueError(f"{self.name(index)}: it cannot be read: {error}") from error
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

    def num_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each member, (num_samples,)."""
        return self.members[:, 2]


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
