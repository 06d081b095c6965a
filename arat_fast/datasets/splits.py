"""The words train, val and test in the names of folders and files, and the labels behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from arat_fast.datasets.base import Samples

Part = TypeVar("Part")

_SPLIT = "(train|val|test)(?:ing|set|id|idation)?"
_SPLIT_FOLDER = re.compile(_SPLIT, re.IGNORECASE)
_SPLIT_WORD = re.compile(rf"(?:^|[-_./]){_SPLIT}(?=[-_./0-9])", re.IGNORECASE)


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


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, but for hidden ones."""
    found = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry for entry in found if not entry.name.startswith("."))


def splits_in_name(name: str) -> set[str]:
    """Which of train, val and test are words of the name of a file."""
    return {match[1].lower() for match in _SPLIT_WORD.finditer(name)}
