"""Images of one's own in an .npz file, of which nothing is unpickled."""

from __future__ import annotations

import errno
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.rows import (
    DAMAGE,
    ArrayRows,
    Images,
    Pixels,
    read_header,
    read_labels,
    settled,
)
from arat_fast.datasets.splits import in_order, own_content
from arat_fast.files import check_ratio

_IMAGES = frozenset(("x", "image", "images", "data", "imgs"))
_LABELS = frozenset(("y", "label", "labels", "target", "targets"))
_NAMES = frozenset(("classes.npy", "class_names.npy", "label_names.npy"))
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@contextmanager
def opened_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file; what is damaged in it, wherever it is read, is said of the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or unpacks to far more than images do.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_ratio(archive, path)
            yield archive
    # RuntimeError: it is encrypted, or compressed in a way that Python does not know. EINVAL: its
    # directory points outside of it.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: expected an .npz file, but it is damaged: {error}") from error


def pixels_in(
    archive: zipfile.ZipFile, member: str, path: Path, number: int | None = None
) -> tuple[Pixels, int, list[str]]:
    """Images of a member of an .npz file.

    Args:
        archive: the file.
        member: its name in it.
        path: of the file, for messages.
        number: of images at most, >= 1; None for all.

    Returns:
        images (N, height, width, channels), uint8; how many there are in all; what was converted.

    Raises:
        ValueError: as for :func:`read_header` and :func:`settled`.
    """
    with archive.open(member) as file:
        stored = read_header(file, path, archive.getinfo(member).file_size)
        total = stored.shape[0]
        if number is None or stored.fortran:
            number = total
        first = replace(stored, shape=(min(number, total), *stored.shape[1:]))
        # Memory that may be written to, as PyTorch wants it.
        content = bytearray(file.read(first.nbytes))
        # At the end of a member its checksum is compared.
        if number >= total and file.read(1):
            raise ValueError(f"{path}: expected {first.nbytes:,} bytes of images, got more")
    numbers = first.view(content, 0)
    first = settled(first, [numbers], path)
    return first.pixels(numbers), total, first.notes()


def names_in(archive: zipfile.ZipFile, member: str, path: Path) -> list[str]:
    """The names of the classes in a member of an .npz file.

    Raises:
        ValueError: it holds something else.
    """
    with archive.open(member) as file:
        lib: Any = np.lib.format
        try:
            names = lib.read_array(file, allow_pickle=False)
        except DAMAGE as error:
            raise ValueError(f"{path}: expected an array of names, got {error}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(
            f"{path}: expected the names of the classes, (num_classes,) str, got {names.dtype} of "
            f"shape {names.shape}"
        )
    return [str(name) for name in names]


def _members(path: Path, members: list[str]) -> dict[str, dict[str, str]]:
    """By split the members that hold its images and its labels."""
    found: dict[str, dict[str, str]] = {}
    for member in members:
        words = re.split(r"[_\-. ]", member.removesuffix(".npy").lower())
        splits = [word for word in words if word in _SPLITS]
        (kind, *others) = [word for word in words if word not in _SPLITS] or [""]
        name = "images" if kind in _IMAGES else "labels"
        if others or len(splits) > 1 or kind not in _IMAGES | _LABELS:
            raise ValueError(
                f"{path}: expected images and labels, x and y, x_train and y_train, images and "
                f"labels, train_images, …, and classes for their names, got {member}"
            )
        held = found.setdefault(_SPLITS[splits[0]] if splits else "train", {})
        if name in held:
            raise ValueError(f"{path}: expected one array, got {held[name]} and {member}")
        held[name] = member
    for split, held in found.items():
        if len(held) < 2:
            only = next(iter(held.values()))
            raise ValueError(f"{path}: expected images with labels of {split}, got {only} alone")
    if "train" not in found:
        raise ValueError(f"{path}: expected images to train on, x and y, got none")
    return in_order(found)


def read_npz(path: Path) -> Content:
    """The images of an .npz file, in memory, by the usual names of its arrays.

    Args:
        path: holds images and labels, x and y or x_train, y_train, x_test, …: (num_samples, height,
            width, channels) or what :class:`arat_fast.datasets.rows.MappedRows` takes for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is absent, not known, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no .npz file at {path}")
    parts: dict[str, Samples] = {}
    notes: dict[str, None] = {}
    with opened_npz(path) as archive:
        members = archive.namelist()
        names = [member for member in members if member in _NAMES]
        for split, held in _members(path, [m for m in members if m not in _NAMES]).items():
            pixels, total, said = pixels_in(archive, held["images"], path)
            with archive.open(held["labels"]) as file:
                labels = read_labels(file, path, total)
            parts[split] = Images(ArrayRows(pixels), labels, path)
            notes |= dict.fromkeys(said)
        classes = tuple(names_in(archive, names[0], path)) if names else None
    converted = [f"{path}: read from {', '.join(notes)}"] if notes else []
    return own_content(path, parts, classes, notes=converted)


register(Dataset("npz", read_npz, own=True, crop=None))
