"""What ``arat-fast data prepare`` does: an .npz file of generated images becomes arrays that are
mapped, not loaded; other images of one's own are decoded, to see whether that works."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from arat_fast.datasets import DATASETS, Content, Dataset
from arat_fast.datasets.encoded import EncodedImages, unreadable
from arat_fast.datasets.folder import has_class_folders
from arat_fast.datasets.members import class_name, read_classes
from arat_fast.datasets.npz import names_in, opened_npz, pixels_in
from arat_fast.datasets.prepared import CHECKSUMS, CHUNK, FILES, array_folder, checksum_line
from arat_fast.datasets.rows import MappedRows, Pixels, read_header, read_labels
from arat_fast.datasets.splits import named_splits
from arat_fast.datasets.webdataset import index_shards, tar_files
from arat_fast.files import folder_atomic, write_text

ROWS = 256
"""Images that are converted at a time."""


MEMBERS = ("image.npy", "label.npy", "classes.npy")
"""Arrays of an .npz file: images, labels and, where it has some, the names of the classes."""


def open_npz(path: Path, number: int) -> tuple[Pixels, Tensor]:
    """The first images of an .npz file, and all labels; nothing is unpickled.

    Args:
        path: the file, as the EDM sets of generated images are published.
        number: of images, at most, >= 1.

    Returns:
        images (at most ``number``, height, width, channels), uint8, and labels (num_samples,),
        int64.

    Raises:
        ValueError: an array is absent, one is not known, of another shape or dtype, or the file is
            cut short.
    """
    with _opened(path) as archive:
        pixels, total, _ = pixels_in(archive, MEMBERS[0], path, number)
        with archive.open(MEMBERS[1]) as file:
            return pixels, read_labels(file, path, total)


def is_generated(path: Path) -> bool:
    """Whether an .npz file has the names of generated images' arrays, :data:`MEMBERS`."""
    with opened_npz(path) as archive:
        return set(archive.namelist()) <= set(MEMBERS)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file that holds :data:`MEMBERS`, the last one or not."""
    with opened_npz(path) as archive:
        found = archive.namelist()
        if sorted(found) not in (sorted(MEMBERS), sorted(MEMBERS[:2])):
            raise ValueError(
                f"{path}: expected the arrays image and label, and classes for their names, "
                f"got {', '.join(found) or 'none'}"
            )
        yield archive


def convert_npz(path: Path, folder: Path) -> tuple[int, list[str]]:
    """Write the arrays of an .npz file as images.npy and labels.npy, which can be mapped.

    The file is read once, in pieces, and its checksums are verified. The folder appears when it is
    whole and on disk; what a conversion that was killed has left of it goes with the next one.

    Args:
        path: the file.
        folder: absent or empty.

    Returns:
        the number of images, and what was converted, in words.

    Raises:
        FileExistsError: the folder has files in it.
        ValueError: as for :func:`open_npz`; a checksum is wrong.
    """
    with _opened(path) as archive, folder_atomic(folder) as made:
        needed = sum(member.file_size for member in archive.infolist())
        with archive.open(MEMBERS[0]) as file:
            # What is converted is there twice for a while.
            if not read_header(file, path, archive.getinfo(MEMBERS[0]).file_size).plain:
                needed *= 2
        free = shutil.disk_usage(made).free
        if needed > free:
            raise OSError(
                f"cannot write {folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} are "
                "free: choose a folder on another disk"
            )
        raw = made / "raw"
        raw.mkdir()
        for name in archive.namelist():
            with archive.open(name) as source, (raw / name).open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
        try:
            rows = MappedRows(raw / MEMBERS[0])
            with (raw / MEMBERS[1]).open("rb") as file:
                labels = read_labels(file, raw / MEMBERS[1], rows.shape[0])
            names = names_in(archive, MEMBERS[2], path) if MEMBERS[2] in archive.namelist() else []
        except (ValueError, EOFError) as error:
            raise ValueError(str(error).replace(f"{raw}{os.sep}", f"{path}: ")) from error
        images = made / FILES[0]
        if rows.stored.plain:
            os.replace(raw / MEMBERS[0], images)
        else:
            lib: Any = np.lib.format
            written = lib.open_memmap(images, "w+", np.uint8, rows.shape)
            for start in range(0, rows.shape[0], ROWS):
                part = rows.take(np.arange(start, min(start + ROWS, rows.shape[0])))
                written[start : start + ROWS] = part
            written.flush()
            del written
        shutil.rmtree(raw)
        np.save(made / FILES[1], labels.numpy())
        if names:
            write_text(made / FILES[2], "".join(f"{name}\n" for name in names))
            if read_classes(made / FILES[2]) != tuple(map(class_name, names)):
                raise ValueError(f"{path}: expected names of classes of one line each")
        lines = [checksum_line(file) for file in sorted(made.iterdir())]
        write_text(made / CHECKSUMS, "".join(f"{line}\n" for line in lines))
        array_folder(made)
    return rows.shape[0], rows.stored.notes()


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
        content = Content(shard, None, (), bad=tuple(others))
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
    if any((folder / FILES[0]).is_file() for folder in folders):
        return DATASETS["arrays"]
    if not root.is_dir() or has_class_folders(root):
        return DATASETS["folder"]
    # Of another name, for the dataset to say.
    other = any(any(folder.glob("*.npy")) for folder in folders)
    return DATASETS["arrays" if other else "webdataset" if tar_files(root) else "folder"]
