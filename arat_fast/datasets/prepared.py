"""Images of one's own in arrays, as ``arat-fast data prepare`` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.members import read_classes, strays
from arat_fast.datasets.rows import Images, MappedRows, read_labels
from arat_fast.datasets.splits import own_content, split_folders

FILES = ("images.npy", "labels.npy", "classes.txt")
"""What is read of a folder of arrays; the last can be absent."""

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
    images, labels = folder / FILES[0], folder / FILES[1]
    for path in (images, labels):
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path}; arat-fast data prepare makes such a folder of an .npz file"
            )
    rows = MappedRows(images)
    with labels.open("rb") as file:
        arrays = Images(rows, read_labels(file, labels, rows.shape[0]), folder)
    # Without an encoding that can fail: whatever else is in it is not a right checksum.
    sums = folder / CHECKSUMS
    expected = sums.read_text("latin-1").splitlines() if sums.exists() else None
    for path in (folder / name for name in FILES):
        if not path.exists():
            continue
        if expected is not None and checksum_line(path) not in expected:
            raise ValueError(
                f"{path} differs from its checksum in {CHECKSUMS}, expected what arat-fast data "
                f"prepare has written: make the folder again, or remove {CHECKSUMS}"
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
    names = read_classes(folder / FILES[2])
    if names is None or expected is None or names == tuple(expected):
        return names
    pairs = enumerate(zip_longest(names, expected, fillvalue="none"))
    label, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"{folder / FILES[2]}: expected the classes of {source} in their order, {theirs} for label "
        f"{label}, got {ours}; count the labels alike, or remove the file where they are"
    )


def conversions(arrays: Images) -> list[str]:
    """A note on what the images of a folder are converted from, where they are."""
    assert isinstance(arrays.rows, MappedRows)
    said = arrays.rows.stored.notes()
    return [f"{arrays.rows.path}: read from {', '.join(said)}"] if said else []


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
    if not (root / FILES[0]).exists():
        folders = split_folders(root) or {"train": root}
        bad = strays(root, [*folders.values(), root / FILES[2]], "arrays by split")
    parts: dict[str, Samples] = {}
    notes = []
    for split, folder in folders.items():
        parts[split] = arrays = array_folder(folder)
        bad += strays(
            folder, [folder / name for name in (*FILES, CHECKSUMS)], " and ".join(FILES[:2])
        )
        notes += conversions(arrays)
    names = None
    for folder in dict.fromkeys((root, *folders.values())):
        names = class_names(folder, names, f"{root} and its splits") or names
    return own_content(root, parts, names, bad, notes)


register(Dataset("arrays", _read, own=True, crop=None))
