"""What ``arat-fast data prepare`` does: an .npz file of generated images becomes arrays that are
mapped, not loaded; other images of one's own are decoded, to see whether that works."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from arat_fast.datasets import DATASETS, Content, Dataset
from arat_fast.datasets.encoded import EncodedImages, unreadable
from arat_fast.datasets.folder import has_class_folders
from arat_fast.datasets.members import CLASSES, class_name, read_classes
from arat_fast.datasets.npz import members_of, names_in, opened_npz
from arat_fast.datasets.prepared import (
    CHECKSUMS,
    CHUNK,
    IMAGES,
    LABELS,
    array_folder,
    checksum_line,
)
from arat_fast.datasets.rows import NPY, MappedRows, read_header, read_labels
from arat_fast.datasets.splits import named_splits
from arat_fast.datasets.webdataset import index_shards, tar_files
from arat_fast.files import folder_atomic, write_text

ROWS = 256
"""Images that are converted at a time."""


def convert_npz(path: Path, folder: Path) -> tuple[int, str]:
    """Write the arrays of an .npz file as images.npy and labels.npy, which can be mapped.

    The file is read once, in pieces, and its checksums are verified. The folder appears when it is
    whole and on disk; what a conversion that was killed has left of it goes with the next one.

    Args:
        path: the file, of one split, as the EDM sets of generated images are published.
        folder: absent or empty.

    Returns:
        the number of images, and what was converted, in words.

    Raises:
        FileExistsError: the folder has files in it.
        ValueError: an array is absent, one is not known, of another shape or dtype, the file is
            cut short or damaged, or it has several splits.
    """
    with opened_npz(path) as archive, folder_atomic(folder) as made:
        splits = members_of(archive, path)
        if len(splits) > 1:
            raise ValueError(f"{path}: expected one split, got {' and '.join(splits)}")
        members = splits["train"]
        needed = sum(member.file_size for member in archive.infolist())
        with archive.open(members.images) as file:
            # What is converted is there twice for a while.
            if not read_header(file, path, archive.getinfo(members.images).file_size).plain:
                needed *= 2
        free = shutil.disk_usage(made).free
        if needed > free:
            raise OSError(
                f"cannot write {folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} are "
                "free: choose a folder on another disk"
            )
        raw, images = made / "raw.npy", made / IMAGES
        with archive.open(members.images) as source, raw.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
        try:
            rows = MappedRows(raw)
        except ValueError as error:
            raise ValueError(str(error).replace(str(raw), str(path))) from error
        with archive.open(members.labels) as file:
            labels = read_labels(file, path, rows.shape[0])
        if rows.stored.plain:
            os.replace(raw, images)
        else:
            written = NPY.open_memmap(images, "w+", np.uint8, rows.shape)
            for start in range(0, rows.shape[0], ROWS):
                part = rows[np.arange(start, min(start + ROWS, rows.shape[0]))]
                written[start : start + ROWS] = part
            written.flush()
            del written
            raw.unlink()
        np.save(made / LABELS, labels.numpy())
        names = names_in(archive, path)
        if names:
            write_text(made / CLASSES, "".join(f"{name}\n" for name in names))
            if read_classes(made) != tuple(map(class_name, names)):
                raise ValueError(f"{path}: expected names of classes of one line each")
        lines = [checksum_line(file) for file in sorted(made.iterdir())]
        write_text(made / CHECKSUMS, "".join(f"{line}\n" for line in lines))
        array_folder(made)
    return rows.shape[0], rows.stored.note()


def verify(path: Path, follow_links: bool = False) -> tuple[int, list[str]]:
    """Decode every image of a folder of one's own, or of one tar shard.

    Args:
        path: the dataset.
        follow_links: also to class folders that are links.

    Returns:
        the number of files, and what is wrong with those that cannot be decoded.

    Raises:
        FileNotFoundError, ValueError: it is no such dataset.
    """
    if path.is_file():
        shard, others = index_shards([path])
        content = Content({"train": shard}, (), tuple(others))
    else:
        content = own_dataset(path).load(path, follow_links=follow_links)
    parts, bad = list(content.parts.values()), list(content.bad)
    for part in parts:
        # Arrays are whole, or were refused.
        if isinstance(part, EncodedImages):
            bad += unreadable(part).values()
    return sum(map(len, parts)) + len(content.bad), bad


def own_dataset(root: Path) -> Dataset:
    """What one's own images are: "npz" or "webdataset" of a file, "arrays", "webdataset" or, if
    nothing else, "folder" of a folder, where stray archives beside class folders do not count."""
    if root.is_file():
        return DATASETS["npz" if root.suffix == ".npz" else "webdataset"]
    folders = [root, *(folder for _, folder in named_splits(root))]
    if any((folder / IMAGES).is_file() for folder in folders):
        return DATASETS["arrays"]
    if not root.is_dir() or has_class_folders(root):
        return DATASETS["folder"]
    # Of another name, for the dataset to say.
    other = any(any(folder.glob("*.npy")) for folder in folders)
    return DATASETS["arrays" if other else "webdataset" if tar_files(root) else "folder"]
