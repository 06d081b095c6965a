"""Encoded images by number: files in folders, members of tar shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arat_fast.datasets.decoding import Pixels, decode_image


class EncodedImages:
    """Images as the bytes of their files, or of members of tar archives, read where they lie.

    Args:
        files: one for each image, or the archives.
        labels: (num_samples,), int64.
        members: (num_samples, 3), int64: archive, first byte and number of bytes of each image;
            None where each has a file.
        names: of the members.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Tensor,
        members: npt.NDArray[np.int64] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.files = tuple(files)
        self.labels = labels
        self.members = members
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.labels)

    def _place(self, index: int) -> tuple[Path, int, int]:
        """The file of an image, its first byte, and the number of bytes, -1 for all."""
        if self.members is None:
            return self.files[index], 0, -1
        archive, start, size = self.members[index].tolist()
        return self.files[archive], start, size

    def name(self, index: int) -> str:
        """The file, or archive and member, for messages."""
        path, _, _ = self._place(index)
        return f"{path}: {self.names[index]}" if self.names else str(path)

    def read(self, index: int) -> bytes:
        """The bytes of one image.

        Raises:
            ValueError: they cannot be read; the message names the file.
        """
        path, start, size = self._place(index)
        try:
            # Opened each time: there can be thousands of archives.
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{self.name(index)}: it cannot be read: {reason}") from error
        if len(content) < size:
            raise ValueError(
                f"{self.name(index)}: expected {size} bytes, got {len(content)}: the archive was "
                "cut since it was listed"
            )
        return content

    def image(self, index: int) -> Pixels:
        """One image, as :func:`decode_image`."""
        return decode_image(self.read(index), self.name(index))

    def subset(self, index: Tensor) -> EncodedImages:
        """The images ``index`` (N,), int64, in that order."""
        labels, chosen = self.labels[index], index.tolist()
        if self.members is None:
            return EncodedImages([self.files[i] for i in chosen], labels)
        names = [self.names[i] for i in chosen]
        return EncodedImages(self.files, labels, self.members[index.numpy()], names)

    def num_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each image, (num_samples,); 0 where they cannot be read."""
        if self.members is not None:
            return self.members[:, 2]
        sizes = np.zeros(len(self), np.int64)
        for index, path in enumerate(self.files):
            with suppress(OSError):
                sizes[index] = path.stat().st_size
        return sizes


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
