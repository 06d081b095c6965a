"""Oxford's 102 flowers and 37 pets: photos of any size, by torchvision's own classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.published import require_folder

FOLDERS = {"flowers": "flowers-102", "pets": "oxford-iiit-pet"}


def _open(name: str, root: Path, split: str, **options: Any) -> Any:
    from torchvision import datasets

    if name == "flowers":
        return datasets.Flowers102(root, split, **options)
    return datasets.OxfordIIITPet(root, "trainval" if split == "train" else split, **options)


def _read(name: str, root: Path) -> Content:
    folder = root / FOLDERS[name]
    require_folder(folder, name)
    names = ("train", "val", "test") if name == "flowers" else ("train", "test")
    try:
        splits = {split: _open(name, root, split) for split in names}
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{folder}: expected {name} as published, got {error}") from error
    parts = {}
    for split, part in splits.items():
        files = part._image_files if name == "flowers" else part._images
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{folder}: expected {len(files)} images, got {len(files) - len(absent)}; the "
                f"first that is absent is {absent[0].name}"
            )
        parts[split] = EncodedImages(files, torch.tensor(part._labels))
    return Content(parts, tuple(splits["train"].classes))


def _fetch(name: str, root: Path) -> None:
    try:
        _open(name, root, "train", download=True)
    # RuntimeError is torchvision's for a wrong checksum; URLError is an OSError.
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"could not download {name} to {root}: {error}") from error


for _name, _label, _num_classes in (
    ("flowers", "Oxford’s 102 flowers", 102),
    ("pets", "Oxford-IIIT pets", 37),
):
    register(
        Dataset(
            _name,
            partial(_read, _name),
            partial(_fetch, _name),
            num_classes=_num_classes,
            places={FOLDERS[_name]: _label},
            label=_label,
        )
    )
