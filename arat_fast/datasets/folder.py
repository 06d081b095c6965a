"""Images of one's own in folders by class."""

from __future__ import annotations

import os
import re
from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.encoded import IMAGE_SUFFIXES, FileImages
from arat_fast.datasets.splits import folders_in, named_splits, split_folders

_CLUTTER = re.compile(
    r"thumbs\.db|desktop\.ini|(readme|licen[cs]e|copying|notice)(\.(txt|md|rst))?", re.IGNORECASE
)


def has_class_folders(root: Path) -> bool:
    """Whether a folder, or a split in it, holds folders with images in them."""
    try:
        parts = [_class_splits(root)["train"]]
    except ValueError:
        # For class_folders to say; tar_shards takes such folders as they are.
        parts = [folder for _, folder in named_splits(root)]
    return any(image_files(folder)[0] for part in parts for folder in folders_in(part))


def _class_splits(root: Path) -> dict[str, Path]:
    splits = split_folders(root)
    # A class can be called train: it has no classes in it, and others beside it.
    if list(splits) == ["train"] and not folders_in(splits["train"]) and len(folders_in(root)) > 1:
        return {"train": root}
    return splits or {"train": root}


def class_folders(root: Path) -> Content:
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
    classes = tuple(folder.name for folder in folders_in(train))
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    parts: dict[str, Samples] = {}
    bad = []
    for split, folder in splits.items():
        for held_out in folders_in(folder):
            if held_out.name not in classes:
                raise ValueError(
                    f"{folder}: expected the classes of {train}, got {held_out.name} too"
                )
        samples = []
        for label, name in enumerate(classes):
            files, others = image_files(folder / name)
            if not files:
                raise ValueError(
                    f"{folder / name}: expected images ({', '.join(IMAGE_SUFFIXES)}), got none; "
                    "remove the class from every split, or add images"
                )
            samples += [(file, label) for file in files]
            bad += others
        parts[split] = FileImages(samples)
    return Content.of_splits(parts, classes, tuple(bad))


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


register(Dataset("folder", class_folders, own=True))
