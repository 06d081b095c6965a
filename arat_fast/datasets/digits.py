"""scikit-learn's digits: 1,797 real 8×8 images of handwritten digits, inside the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.rows import Images

NUM_TEST = 360
MAX_VALUE = 16
_SPLIT_SEED = 0


@cache
def _table() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels (1797, 64) in [0, 16] and labels, float64 and int64: 0.1 s of reading text."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


def load_digits(train: bool) -> tuple[Tensor, Tensor]:
    """The fixed split of the digits: 1,437 images to train on, 360 held out, stratified.

    Args:
        train: True for the training images, False for the held-out ones.

    Returns:
        images (num_samples, 1, 8, 8), uint8 in [0, 16], and labels (num_samples,), int64.

    Source: UCI Optical Recognition of Handwritten Digits, as shipped by scikit-learn.
    """
    from sklearn.model_selection import train_test_split

    images, labels = _table()
    chosen, held_out = train_test_split(
        np.arange(len(labels)), test_size=NUM_TEST, random_state=_SPLIT_SEED, stratify=labels
    )
    index = np.sort(chosen if train else held_out)
    pixels = torch.from_numpy(images[index].astype(np.uint8)).view(-1, 1, 8, 8)
    return pixels, torch.from_numpy(labels[index].astype(np.int64))


def _read(root: Path) -> Content:
    parts = {}
    for split in ("train", "test"):
        images, labels = load_digits(split == "train")
        parts[split] = Images(images.permute(0, 2, 3, 1).numpy(), labels)
    return Content(parts, tuple("0123456789"), max_value=MAX_VALUE)


register(
    Dataset(
        "digits",
        _read,
        image_size=8,
        channels=1,
        num_classes=10,
        label="scikit-learn’s handwritten digits",
    )
)
