"""Conversion of an .npz file of generated images into arrays that are mapped, not loaded."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.data.arrays import read_npy_header
from arat_fast.data.formats import Encoded, array_folder, class_folders, tar_shards, unreadable

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
    try:
        with zipfile.ZipFile(path) as archive:
            missing = {"image.npy", "label.npy"} - set(archive.namelist())
            if missing:
                raise ValueError(
                    f"{path}: expected the arrays image and label, got "
                    f"{', '.join(archive.namelist()) or 'none'}"
                )
            with archive.open("image.npy") as file:
                shape = _header(path, file)
            with archive.open("label.npy") as file:
                lib: Any = np.lib.format
                labels = lib.read_array(file, allow_pickle=False)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected an .npz file, but reading it fails: {error}") from error
    if labels.shape != (shape[0],) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: expected {shape[0]} integer labels, one for each image, got {labels.dtype} "
            f"of shape {labels.shape}"
        )
    if not shape[0]:
        raise ValueError(f"{path}: expected at least one image, got none")
    if labels.min() < 0:
        raise ValueError(f"{path}: expected labels >= 0, got {labels.min()}")
    return shape, torch.from_numpy(labels.astype(np.int64))


def first_images(path: Path, number: int) -> npt.NDArray[np.uint8]:
    """The first images of an .npz file: (at most ``number``, height, width, channels)."""
    with zipfile.ZipFile(path) as archive, archive.open("image.npy") as file:
        shape = _header(path, file)
        count = min(number, shape[0])
        content = file.read(count * int(np.prod(shape[1:])))
    images = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
    return np.repeat(images, 3, 3) if shape[3] == 1 else images


def _header(path: Path, file: IO[bytes]) -> tuple[int, int, int, int]:
    """The shape of the images of an open .npy file, which is left at their first byte."""
    shape, fortran, dtype = read_npy_header(file)
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
            zipfile.ZipFile(path) as archive,
            archive.open("image.npy") as source,
            (work / "images.npy").open("wb") as target,
        ):
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        np.save(work / "labels.npy", labels.numpy())
        rows, _ = array_folder(work)
        if rows.shape != shape:
            raise ValueError(f"{path}: expected images of shape {shape}, got {rows.shape}")
        os.chmod(work, 0o777 & ~_umask())
        os.replace(work, folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: it is damaged: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shape[0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def verify(path: Path) -> tuple[int, list[str]]:
    """Decode every image of a folder by class, or of tar shards.

    Args:
        path: the dataset.

    Returns:
        the number of images, and what is wrong with those that cannot be decoded.

    Raises:
        FileNotFoundError, ValueError: it is no such dataset.
    """
    shards = path.is_file() or any(path.rglob("*.tar"))
    dataset: Encoded = tar_shards(path) if shards else class_folders(path)
    parts = [part for part in (dataset.train, dataset.test) if part is not None]
    reasons = [reason for part in parts for reason in unreadable(part).values()]
    return sum(len(part) for part in parts), reasons
