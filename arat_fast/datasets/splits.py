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

from arat_fast.datasets.base import Content, Samples
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


def named_splits(root: Path) -> list[tuple[str, Path]]:
    """The folders that :func:`split_folders` goes by, each with "train", "val" or "test", whether
    or not they go together."""
    folders = folders_in(root) if root.is_dir() else []
    matches = [(_SPLIT_FOLDER.fullmatch(folder.name), folder) for folder in folders]
    return [(match[1].lower(), folder) for match, folder in matches if match]


def in_order(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts by "train", "val" and "test", in this order."""
    return {split: parts[split] for split in ("train", "val", "test") if split in parts}


def count_classes(root: Path, parts: Mapping[str, Samples]) -> int:
    """The number of classes of labels that count from 0 and all have images to train on.

    Args:
        root: of the dataset, for messages.
        parts: by "train", "val" and "test"; labels >= 0.

    Raises:
        ValueError: a label lacks training images; the sample or the label is named.
    """
    train = parts["train"].labels
    highest = int(train.argmax())
    if int(train[highest]) >= len(train):
        raise ValueError(
            f"{parts['train'].name(highest)}: got label {int(train[highest])}, expected at most "
            f"{len(train) - 1}: labels count from 0, and each has one of the {len(train)} training "
            "images or more"
        )
    counts = torch.bincount(train)
    if not bool(counts.all()):
        raise ValueError(
            f"{root}: expected training images with every label from 0 to {len(counts) - 1}, got "
            f"none with label {int(counts.argmin())}"
        )
    for part in parts.values():
        highest = int(part.labels.argmax())
        if int(part.labels[highest]) >= len(counts):
            raise ValueError(
                f"{part.name(highest)}: got label {int(part.labels[highest])}, which no training "
                f"image has, expected at most {len(counts) - 1}"
            )
    return len(counts)


def splits_in_name(name: str) -> set[str]:
    """Which of train, val and test are words of the name of a file."""
    return {match[1].lower() for match in _SPLIT_WORD.finditer(name)}


def own_content(
    root: Path,
    parts: Mapping[str, Samples],
    names: tuple[str, ...] | None = None,
    bad: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Content:
    """The content of a dataset of one's own: what all kinds of them are refused for.

    Args:
        root: of the dataset, for messages.
        parts: by "train", "val" and "test"; labels >= 0, or all of 1 to their number.
        names: of the classes; None for their numbers.
        bad: what is left out, and why.
        notes: on what was converted.

    Raises:
        ValueError: fewer than two classes, a label without training images, a class without images
            in a split, or another number of names.
    """
    bad, notes = list(bad), list(notes)
    lowest = min(int(part.labels.min()) for part in parts.values())
    highest = int(parts["train"].labels.max())
    numbers = range(highest + 1)
    num_labels = len(np.unique(parts["train"].labels.numpy()))
    if lowest == 1 and num_labels == highest > 1:
        notes.append(f"labels count from 1 to {highest}: label 1 is class 0")
        numbers = range(1, highest + 1)
        for part in parts.values():
            part.labels = part.labels - 1
    elif num_labels == 1:
        raise ValueError(
            f"{root}: expected two classes or more, got label {highest} for each of the "
            f"{len(parts['train'])} training images{f'; {told(bad)}' if bad else ''}"
        )
    num_classes = count_classes(root, parts)
    classes = tuple(map(str, numbers)) if names is None else names
    if len(classes) != num_classes:
        raise ValueError(
            f"{root}: expected {num_classes} names, one for each class with training images, got "
            f"{len(classes)} names"
        )
    for split, part in parts.items():
        absent = torch.bincount(part.labels, minlength=num_classes) == 0
        if bool(absent.any()):
            raise ValueError(
                f"{root}: expected {split} images of each class, got none of class "
                f"{classes[int(absent.int().argmax())]}; add some, or remove the class"
            )
    shapes = {split: p.rows.shape[1:] for split, p in parts.items() if isinstance(p, Images)}
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise ValueError(
                f"{root}: expected {split} images of {shapes['train']} (height, width, channels) "
                f"as those to train on, got {shape}"
            )
    left, shared = _without_shared(in_order(parts))
    return Content.of_splits(left, classes, tuple(bad + shared), tuple(notes))


def _without_shared(parts: Mapping[str, Samples]) -> tuple[dict[str, Samples], list[str]]:
    """Parts without images that one before them has too, and which these are. Where there are many
    images, some are looked for."""
    left: dict[str, Samples] = {}
    bad = []
    for split, part in parts.items():
        kept = torch.ones(len(part), dtype=torch.bool)
        for other in left.values():
            for index, twin in same_images(other, part):
                if kept[index]:
                    bad.append(
                        f"{part.name(index)}: expected splits of different images, got the same "
                        f"as {other.name(twin)}"
                    )
                kept[index] = False
        if not bool(kept.any()):
            raise ValueError(f"{bad[-1]}: no {split} image is left")
        left[split] = part if bool(kept.all()) else part.subset(torch.nonzero(kept)[:, 0])
    return left, bad


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
    for index, digest in zip(chosen.tolist(), looked_at, strict=True):
        if digest in contents:
            yield index, int(contents[digest])


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
        rows = images.rows.take(part).reshape(len(part), -1)
        # One that is blank can be in every split.
        for row, blank in zip(rows, rows.min(1) == rows.max(1), strict=True):
            yield b"" if blank else blake2b(row.tobytes()).digest()
