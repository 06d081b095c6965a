"""STL-10: 5,000 labelled images of 96×96 to train on and 8,000 to evaluate; no unlabelled ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.published import check_file, fetch_folder, require_folder
from arat_fast.datasets.rows import Images
from arat_fast.files import read_lines

FOLDER = "stl10_binary"


def _read(root: Path) -> Content:
    from torchvision.datasets import STL10

    folder = root / FOLDER
    require_folder(folder, "stl10")
    checksums = dict((*STL10.train_list, *STL10.test_list))
    names = [name for name in read_lines(folder / STL10.class_names_file) if name]
    parts = {split: _images(folder, split, checksums) for split in ("train", "test")}
    return Content(parts, tuple(names))


def _images(folder: Path, split: str, checksums: dict[str, str]) -> Images:
    for name in (f"{split}_X.bin", f"{split}_y.bin"):
        check_file(folder / name, checksums[name])
    # Channel by channel, each column by column; labels from 1.
    pixels = np.fromfile(folder / f"{split}_X.bin", np.uint8).reshape(-1, 3, 96, 96)
    labels = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    images = np.ascontiguousarray(pixels.transpose(0, 3, 2, 1))
    return Images(images, torch.from_numpy(labels))


def _fetch(root: Path) -> None:
    from torchvision.datasets import STL10

    fetch_folder(STL10.url, root / STL10.filename, STL10.tgz_md5, root / FOLDER)


register(
    Dataset(
        "stl10",
        _read,
        _fetch,
        image_size=96,
        num_classes=10,
        places={FOLDER: "STL-10"},
        label="STL-10",
    )
)
