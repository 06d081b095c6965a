from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import image_folder

from arat_fast.config import DataConfig
from arat_fast.data import DataSplits, Shard, load_data
from arat_fast.data.dali import has_dali

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
LOADERS = ["dataloader", pytest.param("dali", marks=without_dali)]


def load(name: str, root: Path, loader: str, device: torch.device, **options: Any) -> DataSplits:
    defaults = {"batch_size": 8, "image_size": 24, "num_workers": 2, "padding": 2}
    config = DataConfig(name, root, loader=loader, **{**defaults, **options})  # type: ignore[arg-type]
    return load_data(config, device=device, seed=3, eval_batch_size=7, shard=Shard())


@pytest.mark.parametrize("loader", ["resident", *LOADERS])
def test_digits_on_the_device_are_those_of_the_cpu(loader: str) -> None:
    expected = load("digits", Path(), "resident", CPU, batch_size=200)
    batches = load("digits", Path(), loader, CUDA, batch_size=200)
    for epoch in (0, 1):
        for a, b in zip(expected.train.epoch(epoch), batches.train.epoch(epoch), strict=True):
            assert b.x.device.type == b.y.device.type == "cuda"
            assert torch.equal(a.x, b.x.cpu()) and torch.equal(a.y, b.y.cpu())


@pytest.mark.parametrize(("suffix", "levels"), [(".png", 0), (".jpg", 3)])
@pytest.mark.parametrize("loader", LOADERS)
def test_cropped_files_on_the_device(tmp_path: Path, loader: str, suffix: str, levels: int) -> None:
    root = image_folder(tmp_path / "set", per_class=9, suffix=suffix)
    expected = load("folder", root, "dataloader", CPU, crop="pad")
    batches = load("folder", root, loader, CUDA, crop="pad")
    for split in ("train", "test"):
        pairs = zip(
            getattr(expected, split).epoch(1), getattr(batches, split).epoch(1), strict=True
        )
        for a, b in pairs:
            assert torch.equal(a.y, b.y.cpu())
            assert float((a.x - b.x.cpu()).abs().max()) <= (levels + 0.01) / 255


@without_dali
def test_an_epoch_left_early_and_resumed_on_the_device(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", per_class=12, suffix=".jpg")
    train = load("folder", root, "dali", CUDA).train
    whole = [b.x.clone() for b in train.epoch(0)]
    batches = train.epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    for start in range(len(train)):
        resumed = [b.x for b in train.epoch(0, start)]
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@without_dali
def test_no_batch_of_an_array_waits_for_the_steps_before_it() -> None:
    train = load("digits", Path(), "dali", CUDA, batch_size=200).train
    list(train.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(train.epoch(1))) == len(train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
