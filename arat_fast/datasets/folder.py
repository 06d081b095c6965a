"""Images of one's own in folders by class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.members import (
    IMAGE_SUFFIXES,
    class_name,
    entries,
    files_below,
    folders_in,
    is_description,
    is_document,
    is_image,
    strays,
)
from arat_fast.datasets.splits import named_splits, own_content, split_folders

_NO_CLASSES = frozenset(("images", "imgs", "labels", "masks", "annotations", "targets"))
"""Folders of pictures and of what belongs to them, as for detection and segmentation."""


def has_class_folders(root: Path) -> bool:
    """Whether a folder, or a split in it, holds folders with images in them."""
    try:
        parts = [_class_splits(root)["train"]]
    except ValueError:
        # For class_folders to say; tar_shards takes such folders as they are.
        parts = [folder for _, folder in named_splits(root)]
    return any(image_files([folder])[0] for part in parts for folder in folders_in(part))


def _class_splits(root: Path) -> dict[str, Path]:
    splits = split_folders(root)
    # A class can be called train: it has no classes in it, and others beside it.
    if list(splits) == ["train"] and not folders_in(splits["train"]) and len(folders_in(root)) > 1:
        return {"train": root}
    return splits or {"train": root}


def class_folders(root: Path, follow_links: bool = False) -> Content:
    """Images in folders by class: ROOT/train/CLASS, ROOT/val/CLASS and ROOT/test/CLASS, of which
    either or both of the last can be absent, or ROOT/CLASS.

    Everything below a class folder counts, but for clutter and the documents that archives bring
    along; beside the class folders files about the dataset can lie. All else is in ``bad``.

    Args:
        root: the folder.
        follow_links: whether class folders can be links.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a link that is not to be followed, no class or one, a class without images, a
            class in one split only, splits in a class, or other splits without one to train on.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}, expected one of images by class")
    splits = _class_splits(root)
    train = splits["train"]
    by_split = {split: _by_class(folder, follow_links) for split, folder in splits.items()}
    classes = tuple(sorted(by_split["train"]))
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    if len(classes) == 1:
        raise ValueError(
            f"{train}: expected a folder for each of two classes or more, got {classes[0]} alone"
            + _way_out(root, train)
        )
    if _NO_CLASSES.issuperset(map(str.lower, classes)):
        raise ValueError(
            f"{train}: expected a folder for each class, got {' and '.join(classes)}, as of "
            "segmentation: put the images into a folder by class"
        )
    parts = {}
    bad = [] if root in splits.values() else strays(root, splits.values(), "the splits alone")
    for split, folder in splits.items():
        found = by_split[split]
        bad += strays(folder, chain(*found.values()), "a folder for each class")
        for name in found.keys() - set(classes):
            raise ValueError(f"{folder}: expected the classes of {train}, got {name} too")
        parts[split], others = labelled_files(
            [found.get(name, [folder / name]) for name in classes],
            "remove the class from every split, or add images",
        )
        bad += others
    return own_content(root, parts, classes, bad)


def _by_class(folder: Path, follow_links: bool) -> dict[str, list[Path]]:
    """The folders of each class."""
    found: dict[str, list[Path]] = {}
    for each in folders_in(folder):
        if each.is_symlink() and not follow_links:
            raise ValueError(
                f"{each} is a link to {os.readlink(each)}: a class folder that is a link is "
                "followed only with --data.follow-links (--follow-links of data inspect and "
                "prepare)"
            )
        splits = [inner.name for _, inner in named_splits(each)]
        if splits:
            raise ValueError(
                f"{folder}: expected a folder for each class, but {each.name} holds "
                f"{' and '.join(splits)}; pass {each}, or put the classes into the splits"
            )
        found.setdefault(class_name(each.name), []).append(each)
    return found


def _way_out(root: Path, train: Path) -> str:
    """What may be meant where there is one class."""
    inner = folders_in(train)
    while len(inner) == 1 and not named_splits(inner[0]):
        inner = folders_in(inner[0])
    if len(inner) > 1 and train == root:
        return f"; the classes seem to be in {inner[0].parent}: pass that"
    if len(inner) > 1:
        return f"; the classes seem to be in {inner[0].parent}: move them up into {train}"
    if len(inner) == 1:
        return f"; the splits seem to be in {inner[0]}: pass that"
    labels = [
        entry.name
        for entry in entries(train)
        if entry.is_file() and is_description(entry.name) and not is_document(entry.name)
    ]
    if labels:
        return f"; labels are not read from {labels[0]}: put the images into a folder by class"
    return ""


def labelled_files(classes: Iterable[Sequence[Path]], hint: str) -> tuple[EncodedImages, list[str]]:
    """The image files of each class, and what is wrong with the other files beside them.

    Args:
        classes: the folders of each.
        hint: what to do where a class has no image.

    Raises:
        ValueError: a class has none.
    """
    images: list[Path] = []
    labels: list[int] = []
    bad: list[str] = []
    for label, folders in enumerate(classes):
        files, others = image_files(folders)
        if not files:
            raise ValueError(
                f"{folders[0]}: expected images ({', '.join(IMAGE_SUFFIXES)}), got none; {hint}"
            )
        images += files
        labels += [label] * len(files)
        bad += others
    return EncodedImages(images, torch.tensor(labels)), bad


def image_files(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The image files below folders, sorted, and what is wrong with the other files, but for
    clutter and documents."""
    images, bad = [], []
    for path in sorted(file for folder in folders for file in files_below(folder)):
        if is_document(path.name):
            continue
        if path.is_file() and is_image(path.name):
            images.append(path)
            continue
        link = "a link that is not followed" if path.is_symlink() else "no file"
        kind = "another kind of file" if path.is_file() else link
        bad.append(f"{path}: expected an image ({', '.join(IMAGE_SUFFIXES)}), got {kind}")
    return images, bad


register(
    Dataset("folder", class_folders, linked=partial(class_folders, follow_links=True), own=True)
)
