"""What ``arat-fast data prepare`` does: an .npz file of generated images becomes arrays that are
mapped, not loaded; other images of one's own are decoded, to see whether that works."""

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

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arat_fast.datasets import DATASETS, Content, Dataset
from arat_fast.datasets.encoded import EncodedImages, unreadable
from arat_fast.datasets.folder import has_class_folders
from arat_fast.datasets.prepared import CHECKSUMS, CHUNK, array_folder, checksum_line
from arat_fast.datasets.rows import read_header, read_labels
from arat_fast.datasets.splits import named_splits
from arat_fast.datasets.webdataset import index_shards, tar_files
from arat_fast.files import write_text


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
            shape, _ = read_header(file, path, archive.getinfo("image.npy").file_size)
        if shape[3] not in (1, 3):
            raise ValueError(f"{path}: expected images of 1 or 3 channels, got {shape}")
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
        shape, _ = read_header(file, path, archive.getinfo("image.npy").file_size)
        count = min(number, shape[0])
        content = file.read(count * math.prod(shape[1:]))
    return np.frombuffer(content, np.uint8).reshape(count, *shape[1:])


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
        made = work / folder.name
        made.mkdir()
        with (
            _opened(path) as archive,
            archive.open("image.npy") as source,
            (made / "images.npy").open("wb") as target,
        ):
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        np.save(made / "labels.npy", labels.numpy())
        lines = (checksum_line(made / name) for name in ("images.npy", "labels.npy"))
        write_text(made / CHECKSUMS, "".join(f"{line}\n" for line in lines))
        array_folder(made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shape[0]


def verify(path: Path) -> tuple[int, list[str]]:
    """Decode every image of a folder of one's own, or of one tar shard.

    Args:
        path: the dataset.

    Returns:
        the number of files, and what is wrong with those that cannot be decoded.

    Raises:
        FileNotFoundError, ValueError: it is no such dataset.
    """
    if path.is_file():
        content = Content(index_shards([path]), None, ())
    else:
        content = own_dataset(path).read(path)
    parts, bad = list(content.parts.values()), list(content.bad)
    for part in parts:
        # Arrays are whole, or were refused.
        if isinstance(part, EncodedImages):
            bad += unreadable(part).values()
    return sum(map(len, parts)) + len(content.bad), bad


def own_dataset(root: Path) -> Dataset:
    """What a folder of one's own images is: "arrays", "webdataset" or, if nothing else, "folder".

    Stray archives beside class folders do not count.
    """
    folders = [root, *(folder for _, folder in named_splits(root))]
    if any((folder / "images.npy").is_file() for folder in folders):
        return DATASETS["arrays"]
    shards = root.is_dir() and not has_class_folders(root) and tar_files(root)
    return DATASETS["webdataset" if shards else "folder"]
