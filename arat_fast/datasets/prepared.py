"""Images of one's own in arrays, as ``arat-fast data prepare`` writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.rows import Images, MappedRows, read_labels
from arat_fast.datasets.splits import count_classes, split_folders

CHECKSUMS = "SHA256SUMS"
"""What ``sha256sum --check`` reads, in a folder that arat-fast data prepare has made."""
CHUNK = 2**24
"""Bytes that are read at a time."""


def array_folder(folder: Path) -> Images:
    """Images and labels as ``arat-fast data prepare`` writes them; the images are left on disk.

    Where the folder holds their checksums, both files are read and compared with them first.

    Args:
        folder: holds images.npy, (num_samples, height, width, channels) uint8, and labels.npy.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: they are something else, not as many labels as images, or differ from their
            checksums.
    """
    images, labels = folder / "images.npy", folder / "labels.npy"
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
    for path in (images, labels):
        if expected is not None and checksum_line(path) not in expected:
            raise ValueError(
                f"{path} differs from its checksum in {CHECKSUMS}, expected what arat-fast data "
                f"prepare has written: make the folder again, or remove {CHECKSUMS}"
            )
    return arrays


def checksum_line(path: Path) -> str:
    """The line of a file among the :data:`CHECKSUMS` of its folder."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return f"{digest.hexdigest()}  {path.name}"


def _read(root: Path) -> Content:
    folders = {"train": root}
    if not (root / "images.npy").exists():
        folders = split_folders(root) or {"train": root / "train"}
    parts: dict[str, Samples] = {split: array_folder(path) for split, path in folders.items()}
    return Content.of_splits(parts, tuple(map(str, range(count_classes(root, parts)))))


register(Dataset("arrays", _read, own=True))
