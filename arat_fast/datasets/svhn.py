"""Street View House Numbers, as published in MATLAB's format."""

from __future__ import annotations

from pathlib import Path

import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.published import check_file, fetch
from arat_fast.datasets.rows import Images


def _read(root: Path) -> Content:
    parts = {split: _images(root, split) for split in ("train", "test")}
    return Content(parts, tuple("0123456789"))


def _images(root: Path, split: str) -> Images:
    from torchvision.datasets import SVHN

    _, name, md5 = SVHN.split_list[split]
    check_file(root / name, md5)
    try:
        source = SVHN(root, split=split)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{root / name}: expected svhn as published, got {error}") from error
    labels = torch.from_numpy(source.labels).reshape(-1)
    return Images(source.data.transpose(0, 2, 3, 1), labels)


def _fetch(root: Path) -> None:
    from torchvision.datasets import SVHN

    for split in ("train", "test"):
        url, name, md5 = SVHN.split_list[split]
        fetch(url, root / name, md5)


register(
    Dataset(
        "svhn",
        _read,
        _fetch,
        image_size=32,
        num_classes=10,
        places={"train_32x32.mat": "SVHN"},
        label="SVHN",
    )
)
