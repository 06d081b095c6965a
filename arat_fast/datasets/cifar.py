"""CIFAR-10 and CIFAR-100, in their Python and their binary version."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.published import check_file, fetch_folder, require_folder
from arat_fast.datasets.rows import Images
from arat_fast.files import read_lines

BINARY = {
    "cifar10": (
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        "batches.meta.txt",
        1,
    ),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"], "fine_label_names.txt", 2),
}
"""Folder, training files, test files, class names and labels before each image."""


def _torchvision(name: str) -> Any:
    from torchvision import datasets

    return datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100


def _read(name: str, root: Path) -> Content:
    dataset = _torchvision(name)
    folder, binary = root / dataset.base_folder, root / BINARY[name][0]
    if binary.is_dir() and not folder.is_dir():
        return _read_binary(name, binary)
    require_folder(folder, name)
    # torchvision unpickles them.
    for file, md5 in (*dataset.train_list, *dataset.test_list):
        check_file(folder / file, md5)
    check_file(folder / dataset.meta["filename"], dataset.meta["md5"])
    try:
        found = {split: dataset(root, train=split == "train") for split in ("train", "test")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: expected {name} as published, got {error}") from error
    parts = {split: Images(each.data, torch.tensor(each.targets)) for split, each in found.items()}
    return Content(parts, tuple(found["train"].classes))


def _read_binary(name: str, folder: Path) -> Content:
    _, train, test, names, num_labels = BINARY[name]
    for file in (*train, *test, names):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no dataset file at {folder / file}")
    parts = {
        split: _binary_images([folder / file for file in files], num_labels)
        for split, files in (("train", train), ("test", test))
    }
    lines = map(str.strip, read_lines(folder / names))
    return Content(parts, tuple(line for line in lines if line))


def _binary_images(paths: list[Path], num_labels: int) -> Images:
    record = num_labels + 3 * 32 * 32
    contents = [np.fromfile(path, np.uint8) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        if not len(content) or len(content) % record:
            raise ValueError(
                f"{path}: expected records of {record} bytes, got {len(content)} bytes: it is "
                "damaged"
            )
    records = np.concatenate(contents).reshape(-1, record)
    images = np.ascontiguousarray(records[:, num_labels:]).reshape(-1, 3, 32, 32)
    # CIFAR-100 has the coarse label first.
    labels = torch.from_numpy(records[:, num_labels - 1].astype(np.int64))
    return Images(images.transpose(0, 2, 3, 1), labels)


def _fetch(name: str, root: Path) -> None:
    dataset = _torchvision(name)
    archive, folder = root / dataset.filename, root / dataset.base_folder
    fetch_folder(dataset.url, archive, dataset.tgz_md5, folder)


for _name, _title, _python, _num_classes in (
    ("cifar10", "CIFAR-10", "cifar-10-batches-py", 10),
    ("cifar100", "CIFAR-100", "cifar-100-python", 100),
):
    register(
        Dataset(
            _name,
            partial(_read, _name),
            partial(_fetch, _name),
            image_size=32,
            num_classes=_num_classes,
            label=_title,
            places={
                _python: f"{_title}, Python version",
                BINARY[_name][0]: f"{_title}, binary version",
            },
        )
    )
