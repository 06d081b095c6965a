"""CIFAR-10.1, and CIFAR-10-C and CIFAR-100-C, whose images are corrupted in fifteen ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.published import require_folder
from arat_fast.datasets.rows import Images

FOLDERS = {"cifar10-c": "CIFAR-10-C", "cifar100-c": "CIFAR-100-C"}

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

NUM_SEVERITIES = 5
"""Each file holds the test images as often, from the mildest severity on."""

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen that the published mean is over; four more files are for choosing settings."""


def corrupted_images(name: str, root: Path) -> Iterator[tuple[str, list[Images]]]:
    """Each corruption, with its images by severity; they are left on disk.

    Args:
        name: cifar10-c or cifar100-c.
        root: the folder that holds CIFAR-10-C or CIFAR-100-C as published, or that folder.

    Raises:
        FileNotFoundError: a file of the fifteen, or labels.npy, is absent.
        ValueError: one holds something else.

    Source: Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261), section 4.
    """
    folder = root if (root / "labels.npy").is_file() else root / FOLDERS[name]
    require_folder(folder, name)
    paths = {corruption: folder / f"{corruption}.npy" for corruption in CORRUPTIONS}
    for path in (folder / "labels.npy", *paths.values()):
        if not path.is_file():
            raise FileNotFoundError(f"no dataset file at {path}; {name} is published with it")
    for corruption, path in paths.items():
        images = Images.mapped(path, folder / "labels.npy")
        if len(images) % NUM_SEVERITIES:
            raise ValueError(
                f"{path}: expected images of {NUM_SEVERITIES} severities, as many of each, got "
                f"{len(images):,}"
            )
        severities = torch.arange(len(images)).chunk(NUM_SEVERITIES)
        yield corruption, [images.subset(numbers) for numbers in severities]


def _read(root: Path) -> Content:
    name = "cifar10.1_v6_data.npy"
    places = [root / place / name for place in ("CIFAR-10.1", "CIFAR-10.1/datasets", ".")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        require_folder(places[0].parent, "cifar10.1")
        raise FileNotFoundError(f"no dataset file at {places[0]}")
    images = Images.mapped(path, path.with_name("cifar10.1_v6_labels.npy"))
    return Content({"train": images}, CIFAR10)


register(Dataset("cifar10.1", _read, image_size=32, num_classes=10, label="CIFAR-10.1, version 6"))
