"""Conversion of an .npz file of generated images into arrays that are mapped, not loaded."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arat_fast.data.arrays import read_npy_header
from arat_fast.data.formats import (
    array_folder,
    class_folders,
    has_class_folders,
    index_shards,
    read_labels,
    tar_files,
    tar_shards,
    unreadable,
)

CHUNK = 2**24
"""Bytes that are copied at a time."""


def open_npz(path: Path) -> tuple[tuple[int, int, int, int], Tensor]:
    """What an .npz file with ``image`` and ``label`` holds; nothing is unpickled.

    Args:
        path: the file, as the EDM sets of generated images are published.

    Returns:
        the shape of the images (num_samples, height, width, channels), and their labels
        (num_samples,), int64.

    Raises:
        ValueError: an array is absent, of another shape or dtype, or the file is cut short.
    """
    with _opened(path) as archive:
        missing = {"image.npy", "label.npy"} - set(archive.namelist())
        if missing:
            raise ValueError(
                f"{path}: expected the arrays image and label, got "
                f"{', '.join(archive.namelist()) or 'none'}"
            )
        with archive.open("image.npy") as file:
            shape = _header(path, file)
            expected, found = math.prod(shape), archive.getinfo("image.npy").file_size - file.tell()
        if found != expected:
            raise ValueError(f"{path}: expected {expected:,} bytes of images, got {found:,}")
        if not shape[0]:
            raise ValueError(f"{path}: expected at least one image, got none")
        with archive.open("label.npy") as file:
            return shape, read_labels(file, path, shape[0])


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file; what is damaged in it, wherever it is read, is said of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    # RuntimeError: it is encrypted, or compressed in a way that Python does not know. EINVAL: its
    # directory points outside of it.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: expected an .npz file, but it is damaged: {error}") from error


def first_images(path: Path, number: int) -> npt.NDArray[np.uint8]:
    """The first images of an .npz file: (at most ``number``, height, width, channels)."""
    with _opened(path) as archive, archive.open("image.npy") as file:
        shape = _header(path, file)
        count = min(number, shape[0])
        content = file.read(count * math.prod(shape[1:]))
    images = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
    return np.repeat(images, 3, 3) if shape[3] == 1 else images


def _header(path: Path, file: IO[bytes]) -> tuple[int, int, int, int]:
    """The shape of the images of an open .npy file, which is left at their first byte."""
    try:
        shape, fortran, dtype = read_npy_header(file)
    except ValueError as error:
        raise ValueError(f"{path}: expected an array image.npy, got {error}") from error
    if len(shape) != 4 or dtype != np.uint8 or fortran or shape[3] not in (1, 3):
        raise ValueError(
            f"{path}: expected images (num_samples, height, width, 1 or 3) uint8, got "
            f"{tuple(shape)} {dtype}"
        )
    return int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3])


def convert_npz(path: Path, folder: Path) -> int:
    """Write the arrays of an .npz file as images.npy and labels.npy, which can be mapped.

    The file is read once, in pieces, and its checksums are verified. The folder appears when it is
    whole.

    Args:
        path: the file.
        folder: is made.

    Returns:
        the number of images.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: as for :func:`open_npz`; a checksum is wrong.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already, expected a folder to make")
    shape, labels = open_npz(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with (
            _opened(path) as archive,
            archive.open("image.npy") as source,
            (work / "images.npy").open("wb") as target,
        ):
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        np.save(work / "labels.npy", labels.numpy())
        array_folder(work)
        os.chmod(work, 0o777 & ~_umask())
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shape[0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def verify(path: Path) -> tuple[int, list[str]]:
    """Decode every image of a folder by class, of tar shards or of one of these.

    Args:
        path: the dataset.

    Returns:
        the number of files, and what is wrong with those that cannot be decoded.

    Raises:
        FileNotFoundError, ValueError: it is no such dataset.
    """
    if path.is_file():
        shard = index_shards([path])
        return len(shard), list(unreadable(shard).values())
    shards = path.is_dir() and not has_class_folders(path) and tar_files(path)
    dataset = tar_shards(path) if shards else class_folders(path)
    parts = [part for part in (dataset.train, dataset.val, dataset.test) if part is not None]
    reasons = [reason for part in parts for reason in unreadable(part).values()]
    bad = [*dataset.bad, *reasons]
    return sum(len(part) for part in parts) + len(dataset.bad), bad
