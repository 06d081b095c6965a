"""Tiny-ImageNet: 200 classes of ImageNet at 64 pixels."""

from __future__ import annotations

from pathlib import Path

import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.folder import image_files, labelled_files
from arat_fast.datasets.published import HINT, fetch_folder, require_folder
from arat_fast.files import read_lines

ARCHIVE = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
"""Address of the archive, and its MD5."""

FOLDER = "tiny-imagenet-200"


def _read(root: Path) -> Content:
    """Its validation images are the test images, since the published test images have no labels;
    labels are the numbers of the sorted class folders."""
    folder = root / FOLDER
    require_folder(folder, "tiny-imagenet")
    wnids = sorted({line.strip() for line in _lines(folder / "wnids.txt") if line.strip()})
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    classes = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    train, bad = labelled_files([[folder / "train" / wnid / "images"] for wnid in wnids], HINT)
    test = _test_images(folder / "val", wnids)
    return Content({"train": train, "test": test}, classes, tuple(bad))


def _test_images(folder: Path, wnids: list[str]) -> EncodedImages:
    annotations, images = folder / "val_annotations.txt", folder / "images"
    files, labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        name, wnid, *_ = *line.split("\t"), "", ""
        if wnid.strip() not in wnids or Path(name).name != name:
            raise ValueError(
                f"{annotations}: line {number}: expected a file name and a class of wnids.txt, got "
                f"{line[:60]!r}"
            )
        files.append(images / name)
        labels.append(wnids.index(wnid.strip()))
    there, _ = image_files([images])
    if not there or sorted(files) != there:
        raise ValueError(
            f"{annotations}: expected each image of {images} once, got {len(files)} lines for "
            f"{len(there)} images; {HINT}"
        )
    return EncodedImages(files, torch.tensor(labels))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no dataset file at {path}; {HINT}")
    lines = read_lines(path)
    return lines if lines[-1] else lines[:-1]


def _fetch(root: Path) -> None:
    url, md5 = ARCHIVE
    fetch_folder(url, root / url.rsplit("/", 1)[-1], md5, root / FOLDER)


register(
    Dataset(
        "tiny-imagenet",
        _read,
        _fetch,
        image_size=64,
        num_classes=200,
        places={FOLDER: "Tiny-ImageNet"},
        label="Tiny-ImageNet",
    )
)
