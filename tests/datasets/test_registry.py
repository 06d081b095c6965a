from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from loading import collect, load, refused

from arat_fast import config as configuration
from arat_fast.datasets import DATASETS, Content, Dataset, register
from arat_fast.datasets.rows import Images


def _read(root: Path) -> Content:
    def images(number: int) -> Images:
        labels = torch.arange(number) % 3
        pixels = np.full((number, 5, 5, 2), 7, np.uint8)
        pixels[np.arange(number), 0, 0, 0] = labels.numpy()
        return Images(pixels, labels)

    return Content({"train": images(12), "test": images(6)}, ("a", "b", "c"), max_value=7)


def test_a_dataset_that_registers_itself_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DATASETS, "digits")
    register(Dataset("digits", _read, image_size=5, channels=2, num_classes=3))
    data = load("digits", padding=0, flip=False)
    x, y = collect(data.test)
    assert data.train.image_shape == (2, 5, 5) and data.train.classes == ("a", "b", "c")
    assert torch.equal((7 * x[:, 0, 0, 0]).round().long(), y) and float(x.max()) == 1
    for size, channels in ((6, 2), (5, 1)):
        register(Dataset("digits", _read, image_size=size, channels=channels))
        with refused(f"{size}x{size}x{channels}, got 5x5x2"):
            load("digits")


def test_the_names_are_the_choices_of_the_configuration() -> None:
    assert set(get_args(configuration.DatasetName)) == set(DATASETS)
    with refused("got 'omniglot'"):
        load("omniglot")
