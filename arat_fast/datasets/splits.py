"""The words train, val and test in the names of folders and files, and what splits must be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from arat_fast.datasets.base import Content, Samples, without
from arat_fast.datasets.encoded import EncodedImages, default_workers
from arat_fast.datasets.members import folders_in, told
from arat_fast.datasets.rows import Images, Index

Part = TypeVar("Part")

_SPLIT = "(train|val|test)(?:ing|set|id|idation)?"
_SPLIT_FOLDER = re.compile(_SPLIT, re.IGNORECASE)
_SPLIT_WORD = re.compile(rf"(?:^|[-_./]){_SPLIT}(?=[-_./0-9])", re.IGNORECASE)

FILES_READ = 2**30
"""Bytes of files of one size that are read to compare them, at most; of more, some are, evenly
spread."""

ROWS_READ = 2**32
"""Bytes of an array that are compared at most."""

_FEW = 500
"""Files of a split that are looked for in another, at least."""


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
    return in_order(found)


def split_of(word: str) -> str:
    """Which of train, val and test a word stands for, also training, validation, …, in any case;
    empty for none."""
    match = _SPLIT_FOLDER.fullmatch(word)
    return match[1].lower() if match else ""


def named_splits(root: Path) -> list[tuple[str, Path]]:
    """The folders that :func:`split_folders` goes by, each with "train", "val" or "test", whether
    or not they go together."""
    folders = folders_in(root) if root.is_dir() else []
    return [(split_of(folder.name), folder) for folder in folders if split_of(folder.name)]


def in_order(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts by "train", "val" and "test", in this order."""
    return {split: parts[split] for split in ("train", "val", "test") if split in parts}


def splits_in_name(name: str) -> set[str]:
    """Which of train, val and test are words of the name of a file."""
    return {match[1].lower() for match in _SPLIT_WORD.finditer(name)}


def own_content(
    root: Path,
    parts: Mapping[str, Samples],
    names: tuple[str, ...] | None = None,
    bad: Iterable[str] = (),
) -> Content:
    """The content of a dataset of one's own: what all kinds of them are refused for.

    Args:
        root: of the dataset, for messages.
        parts: by "train", "val" and "test", of which the last two one alone holds the images to
            evaluate; labels >= 0, or all of 1 to their number.
        names: of the classes; None for their numbers.
        bad: what is left out, and why.

    Raises:
        ValueError: fewer than two classes, a label without training images, a class without images
            in a split, another number of names, images of several sizes in arrays, or a split of
            nothing but images of another one.
    """
    bad, parts = list(bad), in_order(parts)
    arrays = {split: part for split, part in parts.items() if isinstance(part, Images)}
    notes = [f"{p.source}: read from {p.note}" for p in arrays.values() if p.note]
    train = parts["train"]
    numbers = np.unique(train.labels.numpy())
    highest, num_classes = int(numbers[-1]), len(numbers)
    if num_classes == 1:
        raise ValueError(
            f"{root}: expected two classes or more, got label {highest} for each of the "
            f"{len(train)} training images{f'; {told(bad)}' if bad else ''}"
        )
    if num_classes == highest and all(int(part.labels.min()) > 0 for part in parts.values()):
        notes.append(f"labels count from 1 to {highest}: label 1 is class 0")
        for part in parts.values():
            part.labels = part.labels - 1
    elif num_classes != highest + 1:
        raise ValueError(
            f"{train.name(int(train.labels.argmax()))}: got label {highest}, expected at most "
            f"{num_classes - 1}: labels count from 0 without a gap, and of the training images "
            f"there are none with label {np.setdiff1d(np.arange(num_classes), numbers)[0]}"
        )
    classes = tuple(map(str, numbers.tolist())) if names is None else names
    if len(classes) != num_classes:
        raise ValueError(
            f"{root}: expected {num_classes} names, one for each class with training images, got "
            f"{len(classes)} names"
        )
    for split, part in parts.items():
        last = int(part.labels.argmax())
        if int(part.labels[last]) >= num_classes:
            raise ValueError(
                f"{part.name(last)}: got label {int(part.labels[last])}, which no training image "
                f"has, expected at most {num_classes - 1}"
            )
        counts = np.bincount(part.labels.numpy(), minlength=num_classes)
        if not counts.all():
            raise ValueError(
                f"{root}: expected {split} images of each class, got none of class "
                f"{classes[counts.argmin()]}; add some, or remove the class"
            )
    for split, images in arrays.items():
        expected, shape = arrays["train"].rows.shape[1:], images.rows.shape[1:]
        if shape != expected:
            raise ValueError(
                f"{root}: expected {split} images of {expected} (height, width, channels) as those "
                f"to train on, got {shape}"
            )
    left, shared = _without_shared(parts)
    files = (part for part in left.values() if isinstance(part, EncodedImages))
    notes += [note for part in files if (note := _in_two_classes(part))]
    if "test" not in left and "val" in left:
        left["test"] = left.pop("val")
    return Content(left, classes, tuple(bad + shared), tuple(dict.fromkeys(notes)))


def _without_shared(parts: Mapping[str, Samples]) -> tuple[dict[str, Samples], list[str]]:
    """Parts without images that one before them has too, and which these are. Where there are many
    images, some are looked for."""
    left: dict[str, Samples] = {}
    bad: list[str] = []
    for split, part in parts.items():
        shared: dict[int, str] = {}
        for other in left.values():
            for index, twin in same_images(other, part):
                reason = (
                    f"{part.name(index)}: expected splits of different images, got the same as "
                    f"{other.name(twin)}"
                )
                shared.setdefault(index, reason)
        bad += shared.values()
        if len(shared) == len(part):
            raise ValueError(f"{bad[-1]}: no {split} image is left")
        left[split] = without(part, shared)
    return left, bad


def _in_two_classes(part: EncodedImages) -> str:
    """What is said of images of a split that stand in two classes; nothing where there are none."""
    _, size, counts = np.unique(part.num_bytes(), return_inverse=True, return_counts=True)
    part = part.subset(torch.from_numpy(np.flatnonzero(counts[size] > 1)))
    pairs = [(i, j) for i, j in same_images(part, part) if part.labels[i] != part.labels[j]]
    if not pairs:
        return ""
    first, twin = map(part.name, pairs[0])
    return f"images that stand in two classes: {len(pairs):,}, the first {first} as {twin}"


def same_images(first: Samples, second: Samples) -> Iterator[tuple[int, int]]:
    """Numbers in the second and in the first split of images that are the same, byte for byte."""
    if isinstance(first, EncodedImages) and isinstance(second, EncodedImages):
        sizes, others = first.num_bytes(), second.num_bytes()
        chosen = np.flatnonzero(np.isin(others, sizes) & (others > 0))
        candidates = np.flatnonzero(np.isin(sizes, others[chosen]))
        while others[chosen].sum() + sizes[candidates].sum() > FILES_READ and len(chosen) > _FEW:
            chosen = chosen[::2]
            candidates = np.flatnonzero(np.isin(sizes, others[chosen]))
        # Many of one size.
        total = int(sizes[candidates].sum())
        candidates = _spread(candidates, len(candidates) * FILES_READ // max(total, 1))
        with ThreadPoolExecutor(default_workers()) as pool:
            contents = dict(
                zip(pool.map(partial(_digest, first), candidates), candidates, strict=True)
            )
            looked_at = pool.map(partial(_digest, second), chosen)
    else:
        assert isinstance(first, Images) and isinstance(second, Images)
        if first.rows.shape[1:] != second.rows.shape[1:]:
            return
        number = ROWS_READ // math.prod(first.rows.shape[1:])
        candidates = _spread(np.arange(len(first)), number)
        contents = dict(zip(_row_digests(first, candidates), candidates, strict=True))
        chosen = _spread(np.arange(len(second)), number)
        looked_at = _row_digests(second, chosen)
    contents.pop(b"", None)
    for index, digest in zip(chosen, looked_at, strict=True):
        if digest in contents:
            yield int(index), int(contents[digest])


def _spread(index: Index, number: int) -> Index:
    """At most that many, evenly spread."""
    if len(index) <= number:
        return index
    return index[np.linspace(0, len(index) - 1, number).astype(np.int64)]


def _digest(images: EncodedImages, index: int) -> bytes:
    try:
        return blake2b(images.read(index)).digest()
    except ValueError:
        # For whoever decodes it to say.
        return b""


def _row_digests(images: Images, index: Index) -> Iterator[bytes]:
    for start in range(0, len(index), 256):
        part = index[start : start + 256]
        rows = images.rows[part].reshape(len(part), -1)
        # One that is blank can be in every split.
        for row, blank in zip(rows, rows.min(1) == rows.max(1), strict=True):
            yield b"" if blank else blake2b(row.tobytes()).digest()
