"""Datasets on disk: class folders, tar shards, arrays, CIFAR's binary files."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.data.arrays import MappedRows, read_npy_header
from arat_fast.data.images import default_workers
from arat_fast.data.sources import (
    IMAGE_SUFFIXES,
    EncodedImages,
    FileImages,
    TarImages,
    decode_image,
)

Part = TypeVar("Part")

BLOCK = 512
"""Bytes of a block of a tar archive."""

_CHUNK = 2**20
_HIGHEST_LABEL = 2**63 - 1

_SPLIT = "(train|val|test)(?:ing|set|id|idation)?"
_SPLIT_FOLDER = re.compile(_SPLIT, re.IGNORECASE)
_SPLIT_WORD = re.compile(rf"(?:^|[-_./]){_SPLIT}(?=[-_./0-9])", re.IGNORECASE)
_CLUTTER = re.compile(
    r"thumbs\.db|desktop\.ini|(readme|licen[cs]e|copying|notice)(\.(txt|md|rst))?", re.IGNORECASE
)

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
        val: the images to validate with, where it has both these and test images.
        bad: what is wrong with the files in its class folders that are no images.
    """

    train: EncodedImages
    test: EncodedImages | None
    classes: tuple[str, ...]
    val: EncodedImages | None = None
    bad: tuple[str, ...] = ()


def split_folders(root: Path) -> dict[str, Path]:
    """The folders train, val and test, also training, validation, …, in any case.

    Args:
        root: the folder that holds them.

    Returns:
        those that are there, by "train", "val" and "test", in this order; empty if none is.

    Raises:
        ValueError: two are of one split, or there is none to train on.
    """
    found: dict[str, Path] = {}
    for split, folder in named_splits(root):
        other = found.setdefault(split, folder)
        if other != folder:
            raise ValueError(
                f"{root}: expected one folder for a split, got {other.name} and {folder.name}"
            )
    if found and "train" not in found:
        name = next(iter(found.values())).name
        raise ValueError(
            f"{root}: expected a folder train beside {name}, got none; rename {name} if it is no "
            "split"
        )
    return _in_order(found)


def named_splits(root: Path) -> list[tuple[str, Path]]:
    """The folders that :func:`split_folders` goes by, each with "train", "val" or "test", whether
    or not they go together."""
    folders = _folders(root) if root.is_dir() else []
    matches = [(_SPLIT_FOLDER.fullmatch(folder.name), folder) for folder in folders]
    return [(match[1].lower(), folder) for match, folder in matches if match]


def _in_order(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {split: parts[split] for split in ("train", "val", "test") if split in parts}


def validation_and_test(parts: Mapping[str, Part]) -> tuple[Part | None, Part | None]:
    """Which parts to validate with and to test: "val" and "test"; one alone is the test's.

    Args:
        parts: by "train", "val" and "test".
    """
    if "val" in parts and "test" in parts:
        return parts["val"], parts["test"]
    return None, parts.get("val", parts.get("test"))


def count_classes(root: Path, parts: Sequence[tuple[Tensor, Callable[[int], str]]]) -> int:
    """The number of classes of labels that count from 0 and all have images to train on.

    Args:
        root: of the dataset, for messages.
        parts: labels (num_samples,), int64, >= 0, of the training images, then of the others, each
            with what a sample is called by its number.

    Raises:
        ValueError: a label lacks training images; the sample or the label is named.
    """
    train, name = parts[0]
    highest = int(train.argmax())
    if int(train[highest]) >= len(train):
        raise ValueError(
            f"{name(highest)}: got label {int(train[highest])}, expected at most {len(train) - 1}: "
            f"labels count from 0, and each has one of the {len(train)} training images or more"
        )
    counts = torch.bincount(train)
    if not bool(counts.all()):
        raise ValueError(
            f"{root}: expected training images with every label from 0 to {len(counts) - 1}, got "
            f"none with label {int(counts.argmin())}"
        )
    for labels, name in parts[1:]:
        highest = int(labels.argmax())
        if int(labels[highest]) >= len(counts):
            raise ValueError(
                f"{name(highest)}: got label {int(labels[highest])}, which no training image has, "
                f"expected at most {len(counts) - 1}"
            )
    return len(counts)


def has_class_folders(root: Path) -> bool:
    """Whether a folder, or a split in it, holds folders with images in them."""
    try:
        parts = [_class_splits(root)["train"]]
    except ValueError:
        # For class_folders to say; tar_shards takes such folders as they are.
        parts = [folder for _, folder in named_splits(root)]
    return any(image_files(folder)[0] for part in parts for folder in _folders(part))


def _class_splits(root: Path) -> dict[str, Path]:
    splits = split_folders(root)
    # A class can be called train: it has no classes in it, and others beside it.
    if list(splits) == ["train"] and not _folders(splits["train"]) and len(_folders(root)) > 1:
        return {"train": root}
    return splits or {"train": root}


def class_folders(root: Path) -> Encoded:
    """Images in folders by class: ROOT/train/CLASS, ROOT/val/CLASS and ROOT/test/CLASS, of which
    either or both of the last can be absent, or ROOT/CLASS.

    Everything below a class folder counts, but for hidden files and folders and the files that
    systems and archives leave there (Thumbs.db, README, LICENSE, …).

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no class, a class without images, a class in one split only, or other splits
            without one to train on.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}, expected one of images by class")
    splits = _class_splits(root)
    train = splits["train"]
    classes = tuple(folder.name for folder in _folders(train))
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    parts, bad = {}, []
    for split, folder in splits.items():
        for held_out in _folders(folder):
            if held_out.name not in classes:
                raise ValueError(
                    f"{folder}: expected the classes of {train}, got {held_out.name} too"
                )
        samples, others = _files(folder, classes)
        parts[split] = FileImages(samples)
        bad += others
    val, test = validation_and_test(parts)
    return Encoded(parts["train"], test, classes, val, tuple(bad))


def _folders(folder: Path) -> list[Path]:
    found = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry for entry in found if not entry.name.startswith("."))


def _files(folder: Path, classes: Sequence[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    samples, bad = [], []
    for label, name in enumerate(classes):
        files, others = image_files(folder / name)
        if not files:
            raise ValueError(
                f"{folder / name}: expected images ({', '.join(IMAGE_SUFFIXES)}), got none; "
                "remove the class from every split, or add images"
            )
        samples += [(file, label) for file in files]
        bad += others
    return samples, bad


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The image files below a folder, sorted, and what is wrong with the other files.

    Hidden files and folders and what systems and archives leave behind are passed over.
    """
    images, bad = [], []
    for base, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names + links:
            path = Path(base, name)
            if name.startswith(".") or _CLUTTER.fullmatch(name):
                continue
            if not path.is_file():
                kind = "a link that is not followed" if path.is_symlink() else "no file"
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                kind = "another kind of file"
            else:
                images.append(path)
                continue
            bad.append(f"{path}: expected an image ({', '.join(IMAGE_SUFFIXES)}), got {kind}")
    return sorted(images), sorted(bad)


def tar_shards(root: Path) -> Encoded:
    """WebDataset shards, each with its split (train, val or test) as a word of its name or of its
    folder's; a sample is KEY.jpg (or another image) and KEY.cls, its label as a number.

    Where no name says a split, all are trained on. ROOT/classes.txt, a name a line, names the
    classes; without it they are called by their numbers.

    Args:
        root: the folder, or one archive.

    Raises:
        FileNotFoundError: no archive is there.
        ValueError: an archive is compressed, cut short or no tar; an image without a label or a
            label without an image; two images of one sample; a class without training images; a
            label that ``classes.txt`` does not have; only some names say a split.
    """
    shards = {"train": [root]} if root.is_file() else _shards_by_split(root)
    parts = {split: index_shards(paths) for split, paths in shards.items()}
    train, (val, test) = parts["train"], validation_and_test(parts)
    num_classes = count_classes(root, [(part.labels, part.name) for part in parts.values()])
    names = (root if root.is_dir() else root.parent) / "classes.txt"
    if not names.is_file():
        return Encoded(train, test, tuple(str(label) for label in range(num_classes)), val)
    lines = (line.strip() for line in names.read_text(encoding="utf-8").split("\n"))
    classes = tuple(line for line in lines if line)
    if len(classes) < num_classes:
        raise ValueError(
            f"{names} names {len(classes)} classes, but there is a label {num_classes - 1} in "
            f"{root}"
        )
    if len(classes) > num_classes:
        raise ValueError(
            f"{names}: expected training images of every class, got none of "
            f"{classes[num_classes]}, label {num_classes}"
        )
    return Encoded(train, test, classes, val)


def _shards_by_split(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in tar_files(root):
        name = path.relative_to(root).as_posix()
        splits = sorted({match[1].lower() for match in _SPLIT_WORD.finditer(name)})
        if len(splits) > 1:
            raise ValueError(
                f"{path}: expected the name of one split at most, got {' and '.join(splits)}"
            )
        found.setdefault("".join(splits), []).append(path)
    if not found:
        raise FileNotFoundError(f"no .tar archive to train on in {root}")
    if set(found) == {""}:
        return {"train": found[""]}
    if "" in found or "train" not in found:
        path = (found.get("") or next(iter(found.values())))[0]
        problem = "only others have" if "" in found else "none to train on is there"
        raise ValueError(
            f"{path}: expected the word train, val or test in the names of all archives or of "
            f"none, and train in some; {problem}"
        )
    return _in_order(found)


def tar_files(root: Path) -> list[Path]:
    """The archives below a folder, sorted; hidden ones are passed over."""
    return sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))


def index_shards(shards: Sequence[Path]) -> TarImages:
    """The images of tar shards.

    Args:
        shards: the archives.

    Raises:
        ValueError: as for :func:`tar_shards`, as far as an archive alone shows it.
    """
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
                    if key in images:
                        raise ValueError(
                            f"{shard}: expected one image for the key {key}, got "
                            f"{images[key][0]} and {member.name}"
                        )
                    images[key] = (member.name, (member.offset_data, member.size))
                elif suffix == ".cls":
                    if key in labels:
                        raise ValueError(f"{shard}: expected {member.name} once, got it twice")
                    labels[key] = _label(tar, member, shard)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard}: expected an uncompressed tar archive, but reading it fails: {error}"
        ) from error
    for key, (name, _) in images.items():
        if key not in labels:
            raise ValueError(f"{shard}: {name} has no label, expected {key}.cls")
    for key in labels:
        if key not in images:
            raise ValueError(
                f"{shard}: {key}.cls has no image, expected one of {', '.join(IMAGE_SUFFIXES)}"
            )
    return [(name, place, labels[key]) for key, (name, place) in images.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(32).strip()
    if not text.isdigit() or int(text) > _HIGHEST_LABEL:
        raise ValueError(
            f"{shard}: {member.name} holds {text!r}, expected a label in [0, {_HIGHEST_LABEL}]"
        )
    return int(text)


def _check_end(shard: Path, end: int) -> None:
    """tarfile takes any header that it cannot read for the end: damage, the end of the first of
    several archives in a row, the end of a file that was cut between two members."""
    with shard.open("rb") as file:
        file.seek(end)
        mark = file.read(2 * BLOCK)
        if len(mark) < 2 * BLOCK:
            raise ValueError(f"{shard}: the end of the archive is missing: it was cut short")
        while mark:
            if any(mark):
                raise ValueError(
                    f"{shard}: expected nothing after the end of the archive at byte {end}, got "
                    "more: it is damaged, or several archives in a row"
                )
            mark = file.read(_CHUNK)


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
    if not rows.shape[0]:
        raise ValueError(f"{images}: expected at least one image, got none")
    with labels.open("rb") as file:
        return rows, read_labels(file, labels, rows.shape[0])


def read_labels(file: IO[bytes], path: Path, number: int) -> Tensor:
    """The labels of an open .npy file; nothing is unpickled.

    Args:
        file: is read to the end of the array.
        path: for messages.
        number: of labels that are expected, >= 1.

    Returns:
        labels (number,), int64, >= 0.

    Raises:
        ValueError: it holds something else, or is cut short.
    """
    try:
        shape, _, dtype = read_npy_header(file)
    except ValueError as error:
        raise ValueError(f"{path}: expected an .npy array of labels, got {error}") from error
    if shape != (number,) or not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"{path}: expected {number} integer labels, one for each image, got {dtype} of shape "
            f"{shape}"
        )
    expected = number * dtype.itemsize
    # One byte more: the checksum of a member of an .npz file is compared at its end.
    content = file.read(expected + 1)
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(content)}: it was cut short"
        raise ValueError(f"{path}: expected {expected} bytes of labels, got {found}")
    y = np.frombuffer(content, dtype)
    low, high = int(y.min()), int(y.max())
    if low < 0:
        raise ValueError(f"{path}: expected labels >= 0, got {low}")
    if high > _HIGHEST_LABEL:
        raise ValueError(f"{path}: expected labels < 2^63, got {high}")
    return torch.from_numpy(y.astype(np.int64))


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


def decode_all(source: EncodedImages, size: int, expected: str) -> npt.NDArray[np.uint8]:
    """Decode images of one size, in several threads.

    Args:
        source: the images.
        size: their height and width.
        expected: who expects that size, for the message.

    Returns:
        (num_samples, size, size, 3).

    Raises:
        ValueError: an image is of another size, or cannot be decoded.
    """
    pixels = np.empty((len(source), size, size, 3), np.uint8)

    def decode(index: int) -> None:
        image = decode_image(source.read(index), source.name(index))
        if image.shape[:2] != (size, size):
            raise ValueError(
                f"{source.name(index)}: {expected} images of {size} x {size} pixels, got "
                f"{image.shape[0]} x {image.shape[1]}"
            )
        pixels[index] = image

    with ThreadPoolExecutor(default_workers()) as pool:
        for _ in pool.map(decode, range(len(source))):
            pass
    return pixels
