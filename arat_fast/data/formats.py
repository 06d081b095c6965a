"""Datasets on disk: class folders, tar shards, arrays, CIFAR's binary files."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arat_fast.data.arrays import MappedRows
from arat_fast.data.images import default_workers
from arat_fast.data.sources import (
    IMAGE_SUFFIXES,
    EncodedImages,
    FileImages,
    TarImages,
    decode_image,
)

BLOCK = 512
"""Bytes of a block of a tar archive."""

CIFAR_BINARY = {
    "cifar10": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        "batches.meta.txt",
        1,
    ),
    "cifar100": (
        "cifar-100-binary",
        ["train.bin"],
        ["test.bin"],
        "fine_label_names.txt",
        2,
    ),
}
"""Folder, training files, test files, class names and labels before each image."""


class Encoded(NamedTuple):
    """A dataset of encoded images.

    Attributes:
        train: the images to train on.
        test: the images to evaluate; None where the dataset has no such split.
        classes: class names, one per label.
    """

    train: EncodedImages
    test: EncodedImages | None
    classes: tuple[str, ...]


def class_folders(root: Path) -> Encoded:
    """Images in folders by class: ROOT/train/CLASS and ROOT/val or ROOT/test, or ROOT/CLASS.

    Files whose names do not end like an image's are passed over.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no class, a class without images, or a class in one split only.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}, expected one of images by class")
    train = root / "train" if (root / "train").is_dir() else root
    classes = tuple(folder.name for folder in _folders(train))
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    held_out = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
    if held_out is None or train == root:
        return Encoded(FileImages(_files(train, classes)), None, classes)
    for folder in _folders(held_out):
        if folder.name not in classes:
            raise ValueError(f"{held_out}: expected the classes of {train}, got {folder.name} too")
    return Encoded(
        FileImages(_files(train, classes)), FileImages(_files(held_out, classes)), classes
    )


def _folders(folder: Path) -> list[Path]:
    found = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry for entry in found if not entry.name.startswith("."))


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    samples = []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            raise ValueError(
                f"{folder / name}: expected images ({', '.join(IMAGE_SUFFIXES)}), got none; "
                "remove the class from every split, or add images"
            )
        samples += [(file, label) for file in files]
    return samples


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def tar_shards(root: Path) -> Encoded:
    """WebDataset shards: ROOT/train*.tar and ROOT/val*.tar or ROOT/test*.tar, also in folders of
    these names; a sample is KEY.jpg (or another image) and KEY.cls, its label as a number.

    ROOT/classes.txt, a name a line, names the classes; without it they are called by their numbers.

    Args:
        root: the folder, or one archive.

    Raises:
        FileNotFoundError: no archive is there.
        ValueError: an archive is compressed, cut short or no tar; an image has no label, or one
            that ``classes.txt`` does not have.
    """
    if root.is_file():
        shards, held_out = [root], []
    else:
        everything = sorted(root.rglob("*.tar"))
        by_name = {
            split: [p for p in everything if p.relative_to(root).parts[0].startswith(split)]
            for split in ("train", "val", "test")
        }
        shards = by_name["train"] or [
            p for p in everything if p not in by_name["val"] + by_name["test"]
        ]
        held_out = by_name["val"] or by_name["test"]
    if not shards:
        raise FileNotFoundError(f"no .tar archive to train on in {root}")
    train = _index(shards)
    test = _index(held_out) if held_out else None
    highest = max(int(part.labels.max()) for part in (train, test) if part is not None)
    names = (root if root.is_dir() else root.parent) / "classes.txt"
    if names.is_file():
        classes = tuple(names.read_text(encoding="utf-8").split("\n"))
        classes = tuple(name.strip() for name in classes if name.strip())
        if highest >= len(classes):
            raise ValueError(
                f"{names} names {len(classes)} classes, but there is a label {highest} in {root}"
            )
    else:
        classes = tuple(str(label) for label in range(highest + 1))
    return Encoded(train, test, classes)


def _index(shards: Sequence[Path]) -> TarImages:
    members, names, labels = [], [], []
    for number, shard in enumerate(shards):
        for name, (start, size), label in _tar_samples(shard):
            members.append((number, start, size))
            names.append(name)
            labels.append(label)
    if not names:
        raise ValueError(f"{shards[0]}: expected images with labels, got none")
    index = np.array(members, np.int64).reshape(-1, 3)
    return TarImages(shards, index, names, torch.tensor(labels, dtype=torch.int64))


def _tar_samples(shard: Path) -> list[tuple[str, tuple[int, int], int]]:
    """Name, place and label of each image in an archive."""
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                if suffix in IMAGE_SUFFIXES:
                    images[key] = (member.name, (member.offset_data, member.size))
                elif suffix == ".cls":
                    labels[key] = _label(tar, member, shard)
        _check_end(shard)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard}: expected an uncompressed tar archive, but reading it fails: {error}"
        ) from error
    for key, (name, _) in images.items():
        if key not in labels:
            raise ValueError(f"{shard}: {name} has no label, expected {key}.cls")
    return [(name, place, labels[key]) for key, (name, place) in images.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(32).strip()
    if not text.isdigit():
        raise ValueError(f"{shard}: {member.name} holds {text!r}, expected a label >= 0")
    return int(text)


def _check_end(shard: Path) -> None:
    """An archive that was cut between two members looks whole but for the end it lacks."""
    with shard.open("rb") as file:
        file.seek(max(shard.stat().st_size - 2 * BLOCK, 0))
        if file.read() != bytes(2 * BLOCK):
            raise ValueError(f"{shard}: the end of the archive is missing: it was cut short")


def array_folder(folder: Path) -> tuple[MappedRows, Tensor]:
    """Images and labels as ``arat-fast data prepare`` writes them.

    Args:
        folder: holds images.npy, (num_samples, height, width, channels) uint8, and labels.npy.

    Returns:
        the images, left on disk, and their labels (num_samples,), int64.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: they are something else, or not as many labels as images.
    """
    images, labels = folder / "images.npy", folder / "labels.npy"
    for path in (images, labels):
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path}; arat-fast data prepare makes such a folder of an .npz file"
            )
    rows = MappedRows(images)
    try:
        y = np.load(labels, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{labels}: expected an .npy array, got {error}") from error
    if y.shape != (rows.shape[0],) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{labels}: expected {rows.shape[0]} integers, one for each of the images, got "
            f"{y.dtype} of shape {y.shape}"
        )
    if rows.shape[0] and y.min() < 0:
        raise ValueError(f"{labels}: expected labels >= 0, got {y.min()}")
    return rows, torch.from_numpy(y.astype(np.int64, copy=False))


def cifar_binary(name: str, root: Path) -> tuple[list[Tensor], tuple[str, ...]] | None:
    """CIFAR's binary version; None where its folder is not there.

    Args:
        name: cifar10 or cifar100.
        root: the folder that holds the dataset's.

    Returns:
        training images (num_samples, 3, 32, 32), uint8, their labels, int64, the same of the test
        images, and the class names.

    Raises:
        ValueError: a file does not consist of whole images.
    """
    folder_name, train, test, meta, num_labels = CIFAR_BINARY[name]
    folder = root / folder_name
    if not folder.is_dir():
        return None
    record = num_labels + 3 * 32 * 32
    parts = []
    for files in (train, test):
        contents = []
        for file in files:
            path = folder / file
            if not path.is_file():
                raise FileNotFoundError(f"no dataset file at {path}")
            content = np.fromfile(path, np.uint8)
            if not len(content) or len(content) % record:
                raise ValueError(
                    f"{path}: expected records of {record} bytes, got {len(content)} bytes: it is "
                    "damaged"
                )
            contents.append(content.reshape(-1, record))
        records = np.concatenate(contents)
        # CIFAR-100 has the coarse label first.
        labels = records[:, num_labels - 1].astype(np.int64)
        images = np.ascontiguousarray(records[:, num_labels:]).reshape(-1, 3, 32, 32)
        parts += [torch.from_numpy(images), torch.from_numpy(labels)]
    names = folder / meta
    if not names.is_file():
        raise FileNotFoundError(f"no dataset file at {names}")
    classes = tuple(line.strip() for line in names.read_text().splitlines() if line.strip())
    return parts, classes


def unreadable(
    source: EncodedImages, progress: Callable[[str, int, int], None] | None = None
) -> dict[int, str]:
    """Decode every image; what is wrong with those that cannot be, by number.

    Args:
        source: the images.
        progress: told what is done, how many images of it and of how many.
    """

    def check(index: int) -> str:
        try:
            decode_image(source.read(index), source.name(index))
        except ValueError as error:
            return str(error)
        return ""

    bad = {}
    with ThreadPoolExecutor(default_workers()) as pool:
        for index, reason in enumerate(pool.map(check, range(len(source)))):
            if reason:
                bad[index] = reason
            if progress is not None:
                progress("checking files", index + 1, len(source))
    return bad
