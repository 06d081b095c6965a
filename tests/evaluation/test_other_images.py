"""Evaluation on published arrays: CIFAR-10.1, and corrupted images averaged as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arat_fast.config import DataConfig
from arat_fast.data import load_data
from arat_fast.datasets.corruptions import CORRUPTIONS
from arat_fast.evaluation.corruptions import corruption_accuracy


class Bright(nn.Module):
    """Answers the tens of the brightest level of an image: what it was written with."""

    def forward(self, x: Tensor) -> Tensor:
        answer = (255 * x.flatten(1).amax(1)).round().long() // 20
        return nn.functional.one_hot(answer.clamp(max=9), 10).float()


def test_the_mean_is_over_severities_then_over_corruptions(tmp_path: Path) -> None:
    """Of corruption k, severity s, the first k mod 4 + s images of ten are answered wrongly."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    labels = np.tile(np.arange(10), 5)
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    expected = []
    for number, name in enumerate(CORRUPTIONS):
        levels = labels * 20 + 5
        for severity in range(5):
            wrong = slice(10 * severity, 10 * severity + number % 4 + severity)
            levels[wrong] = (levels[wrong] + 20) % 200
            expected.append(1 - (number % 4 + severity) / 10)
        images = np.zeros((50, 4, 4, 3), np.uint8)
        images[:, 1, 2] = levels[:, None]
        np.save(folder / f"{name}.npy", images)
    found = corruption_accuracy(
        Bright(), "cifar10-c", tmp_path, device=torch.device("cpu"), batch_size=4
    )
    assert found["corruptions"]["gaussian_noise"] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    assert found["mean"] == pytest.approx(np.mean(expected)) and found["num_samples"] == 10
    (folder / "frost.npy").unlink()
    with pytest.raises(FileNotFoundError, match="frost"):
        corruption_accuracy(
            Bright(), "cifar10-c", tmp_path, device=torch.device("cpu"), batch_size=4
        )


def test_all_images_that_are_not_split_are_tested(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    images = source.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", (np.arange(40) % 10).astype(np.int32))
    splits = load_data(
        DataConfig("cifar10.1", tmp_path),
        device=torch.device("cpu"),
        seed=0,
        eval_batch_size=40,
        all_to_test=True,
    )
    (batch,) = splits.test.epoch(0)
    assert torch.equal(batch.x, torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert splits.test.classes[9] == "truck" and batch.y.tolist() == [n % 10 for n in range(40)]
