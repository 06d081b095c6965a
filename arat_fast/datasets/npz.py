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
from typing import NamedTuple

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.rows import DAMAGE, NPY, Images, read_header, read_labels, settled
from arat_fast.datasets.splits import own_content, split_of
from arat_fast.files import check_ratio

_KINDS = {
    **dict.fromkeys(("x", "image", "images", "data", "imgs"), "images"),
    **dict.fromkeys(("y", "label", "labels", "target", "targets"), "labels"),
}
_NAMES = frozenset(("classes.npy", "class_names.npy", "label_names.npy"))


class Members(NamedTuple):
    """The arrays of a split: their names in an .npz file."""

    images: str
    labels: str


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


def members_of(archive: zipfile.ZipFile, path: Path) -> dict[str, Members]:
    """The arrays of an .npz file by "train", "val" and "test".

    Raises:
        ValueError: one is not known, there twice or absent, or there are none to train on.
    """
    found: dict[str, dict[str, str]] = {}
    for member in archive.namelist():
        if member in _NAMES:
            continue
        words = re.split(r"[_\-. ]", member.removesuffix(".npy"))
        splits = [split_of(word) for word in words if split_of(word)] or ["train"]
        kinds = [_KINDS.get(word.lower()) for word in words if not split_of(word)]
        (kind, *more) = kinds or [None]
        if kind is None or more or len(splits) > 1:
            raise ValueError(
                f"{path}: expected images and labels, x and y, x_train and y_train, images and "
                f"labels, train_images, …, and classes for their names, got {member}"
            )
        held = found.setdefault(splits[0], {})
        if kind in held:
            raise ValueError(f"{path}: expected one array, got {held[kind]} and {member}")
        held[kind] = member
    for split, held in found.items():
        if len(held) < 2:
            only = next(iter(held.values()))
            raise ValueError(f"{path}: expected images with labels of {split}, got {only} alone")
    if "train" not in found:
        raise ValueError(f"{path}: expected images to train on, x and y, got none")
    return {split: Members(**held) for split, held in found.items()}


def images_in(
    archive: zipfile.ZipFile, path: Path, members: Members, number: int | None = None
) -> Images:
    """Images of an .npz file, in memory, and the labels of all.

    Args:
        archive: the file.
        path: of the file, for messages.
        members: the arrays.
        number: of images at most, >= 1; None for all.

    Raises:
        ValueError: as for :func:`read_header`, :func:`settled` and :func:`read_labels`.
    """
    with archive.open(members.images) as file:
        stored = read_header(file, path, archive.getinfo(members.images).file_size)
        total = stored.shape[0]
        if number is None or stored.fortran:
            number = total
        first = replace(stored, shape=(min(number, total), *stored.shape[1:]), offset=0)
        # Memory that may be written to, as PyTorch wants it.
        content = bytearray(file.read(first.nbytes))
        # At the end of a member its checksum is compared.
        if number >= total and file.read(1):
            raise ValueError(f"{path}: expected {first.nbytes:,} bytes of images, got more")
    numbers = first.view(content)
    first = settled(first, [numbers], path)
    with archive.open(members.labels) as file:
        return Images(first.pixels(numbers), read_labels(file, path, total), path, first.note())


def names_in(archive: zipfile.ZipFile, path: Path) -> tuple[str, ...] | None:
    """The names of the classes in an .npz file; None where it has none.

    Raises:
        ValueError: it holds something else under that name.
    """
    members = [member for member in archive.namelist() if member in _NAMES]
    if not members:
        return None
    with archive.open(members[0]) as file:
        try:
            names = NPY.read_array(file, allow_pickle=False)
        except DAMAGE as error:
            raise ValueError(f"{path}: expected an array of names, got {error}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(
            f"{path}: expected the names of the classes, (num_classes,) str, got {names.dtype} of "
            f"shape {names.shape}"
        )
    return tuple(names.tolist())


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
    with opened_npz(path) as archive:
        splits = members_of(archive, path)
        parts = {split: images_in(archive, path, members) for split, members in splits.items()}
        names = names_in(archive, path)
    return own_content(path, parts, names)


register(Dataset("npz", read_npz, own=True, crop=None))
