"""Images of one's own in .npz files, by the usual names of their arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arat_fast.config import DataConfig
from arat_fast.data import load_data
from arat_fast.data.inspect import inspect
from arat_fast.datasets import DATASETS
from arat_fast.datasets.rows import Images


def arrays(number: int, height: int = 6, width: int = 9, classes: int = 3) -> tuple[Any, Any]:
    source = np.random.default_rng(number)
    images = source.integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return images, np.arange(number) % classes


def read(path: Path) -> Any:
    return DATASETS["npz"].load(path)


@pytest.mark.parametrize(
    "names", [("x", "y"), ("images", "labels"), ("image", "label"), ("X_train", "y_train")]
)
def test_one_split(tmp_path: Path, names: tuple[str, str]) -> None:
    x, y = arrays(12)
    np.savez(tmp_path / "set.npz", **dict(zip(names, (x, y), strict=True)))
    content = read(tmp_path / "set.npz")
    assert isinstance(content.train, Images) and content.test is None
    assert np.array_equal(content.train.rows[np.arange(12)], x)
    assert content.train.labels.tolist() == y.tolist()


def test_splits_names_and_conversions(tmp_path: Path) -> None:
    """As MedMNIST's files are: labels in a column, here with channels first, floats, and names."""
    held = {}
    for split, number in (("train", 30), ("val", 6), ("test", 9)):
        x, y = arrays(number)
        held[f"{split}_images"] = (x.transpose(0, 3, 1, 2) / 255).astype(np.float32)
        held[f"{split}_labels"] = y[:, None]
    np.savez_compressed(tmp_path / "set.npz", **held, classes=np.array(["a", "b", "č"]))
    content = read(tmp_path / "set.npz")
    assert content.classes == ("a", "b", "č")
    assert {name: len(part) for name, part in content.parts.items()} == {
        "train": 30,
        "val": 6,
        "test": 9,
    }
    assert isinstance(content.test, Images)
    assert np.array_equal(content.test.rows[np.arange(9)], arrays(9)[0])
    assert "float32" in content.notes[0]
    found = inspect(tmp_path / "set.npz")
    assert "--data.name npz" in found.use and found.sizes == {"6 x 9": 45}


@pytest.mark.parametrize(
    ("held", "word"),
    [
        ({"x": arrays(6)[0]}, "alone"),
        ({"x": arrays(6)[0], "y": np.arange(5)}, "6 integer labels"),
        ({"x_test": arrays(6)[0], "y_test": arrays(6)[1]}, "train on"),
        ({"x": arrays(6)[0], "y": arrays(6)[1], "weights": np.ones(3)}, "weights.npy"),
        ({"x": arrays(6)[0], "images": arrays(6)[0], "y": arrays(6)[1]}, "images.npy"),
        ({"x": np.array([{}]), "y": arrays(6)[1]}, "x"),
    ],
)
def test_what_is_refused(tmp_path: Path, held: dict[str, Any], word: str) -> None:
    np.savez(tmp_path / "set.npz", **held)
    with pytest.raises(ValueError, match=word):
        read(tmp_path / "set.npz")


@pytest.mark.parametrize("loader", ["resident", "dataloader"])
def test_batches_are_not_square(tmp_path: Path, loader: Any) -> None:
    x, y = arrays(12)
    test, labels = arrays(6)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=test, y_test=labels)
    config = DataConfig(
        "npz", tmp_path / "set.npz", batch_size=4, loader=loader, padding=2, num_workers=0
    )
    splits = load_data(config, device=torch.device("cpu"), seed=0, eval_batch_size=6)
    assert splits.train.image_shape == (3, 6, 9)
    assert [tuple(batch.x.shape) for batch in splits.train.epoch(0)] == [(4, 3, 6, 9)] * 3
    (batch,) = splits.test.epoch(0)
    assert torch.equal(batch.x, torch.from_numpy(test).permute(0, 3, 1, 2) / 255)
