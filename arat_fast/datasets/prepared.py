"""Images of one's own in arrays, as ``arat-fast data prepare`` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.members import CLASSES, read_classes, strays
from arat_fast.datasets.rows import Images
from arat_fast.datasets.splits import own_content, split_folders

IMAGES, LABELS = "images.npy", "labels.npy"

CHECKSUMS = "SHA256SUMS"
"""What ``sha256sum --check`` reads, in a folder that arat-fast data prepare has made."""

CHUNK = 2**24
"""Bytes that are read at a time."""


def array_folder(folder: Path) -> Images:
    """Images and labels as ``arat-fast data prepare`` writes them; the images are left on disk.

    Where the folder holds their checksums, both files are read and compared with them first.

    Args:
        folder: holds images.npy, (num_samples, height, width, channels) uint8 or what
            :class:`arat_fast.datasets.rows.MappedRows` takes for it, and labels.npy.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: they are something else, not as many labels as images, or differ from their
            checksums.
    """
    for path in (folder / IMAGES, folder / LABELS):
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path}; arat-fast data prepare makes such a folder of an .npz file"
            )
    arrays = Images.mapped(folder / IMAGES, folder / LABELS)
    if (folder / CHECKSUMS).exists():
        # In an encoding that cannot fail: whatever else is in it is not a right checksum.
        expected = (folder / CHECKSUMS).read_text("latin-1").splitlines()
        for path in (folder / IMAGES, folder / LABELS, folder / CLASSES):
            if path.exists() and checksum_line(path) not in expected:
                raise ValueError(
                    f"{path} differs from its checksum in {CHECKSUMS}, expected what arat-fast "
                    f"data prepare has written: make the folder again, or remove {CHECKSUMS}"
                )
    return arrays


def class_names(
    folder: Path, expected: Sequence[str] | None, source: object
) -> tuple[str, ...] | None:
    """The names of the classes of a folder of arrays; None where it has none.

    Args:
        folder: the folder.
        expected: what the same labels are called elsewhere; None where that is not known.
        source: where, for the error.

    Raises:
        ValueError: they are others, or in another order, so that a label means something else.
    """
    names = read_classes(folder)
    if names is None or expected is None or names == tuple(expected):
        return names
    pairs = enumerate(zip_longest(names, expected, fillvalue="none"))
    label, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"{folder / CLASSES}: expected the classes of {source} in their order, {theirs} for label "
        f"{label}, got {ours}; count the labels alike, or remove the file where they are"
    )


def checksum_line(path: Path) -> str:
    """The line of a file among the :data:`CHECKSUMS` of its folder."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{digest.hexdigest()}  {path.name}"


def _read(root: Path) -> Content:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}, expected one of arrays")
    folders, bad = {"train": root}, []
    if not (root / IMAGES).exists():
        folders = split_folders(root) or {"train": root}
        bad = strays(root, [*folders.values(), root / CLASSES], "arrays by split")
    for folder in folders.values():
        used = [folder / name for name in (IMAGES, LABELS, CLASSES, CHECKSUMS)]
        bad += strays(folder, used, f"{IMAGES} and {LABELS}")
    parts = {split: array_folder(folder) for split, folder in folders.items()}
    names = None
    for folder in dict.fromkeys((root, *folders.values())):
        names = class_names(folder, names, f"{root} and its splits") or names
    return own_content(root, parts, names, bad)


register(Dataset("arrays", _read, own=True, crop=None))
