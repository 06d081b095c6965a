from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loading import CPU, LOADERS, load, needs_dali
from pictures import image_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("loader", ["resident", *LOADERS])
def test_digits_on_the_device_are_those_of_the_cpu(loader: str) -> None:
    options: dict[str, Any] = {"batch_size": 200, "padding": 2}
    expected = load("digits", loader="resident", **options)
    batches = load("digits", loader=loader, device=CUDA, num_workers=2, **options)
    for epoch in (0, 1):
        for a, b in zip(expected.train.epoch(epoch), batches.train.epoch(epoch), strict=True):
            assert b.x.device.type == b.y.device.type == "cuda"
            assert torch.equal(a.x, b.x.cpu()) and torch.equal(a.y, b.y.cpu())


@pytest.mark.parametrize(("suffix", "levels"), [(".png", 0), (".jpg", 3)])
@pytest.mark.parametrize("loader", LOADERS)
def test_cropped_files_on_the_device(tmp_path: Path, loader: str, suffix: str, levels: int) -> None:
    root = image_folder(tmp_path / "set", per_class=9, suffix=suffix)
    expected, splits = (
        load("folder", root, loader=one, device=device, crop="pad", padding=2, num_workers=2)
        for one, device in (("dataloader", CPU), (loader, CUDA))
    )
    for one, other in ((expected.train, splits.train), (expected.test, splits.test)):
        for a, b in zip(one.epoch(1), other.epoch(1), strict=True):
            assert torch.equal(a.y, b.y.cpu())
            assert float((a.x - b.x.cpu()).abs().max()) <= (levels + 0.01) / 255


@needs_dali
def test_an_epoch_left_early_and_resumed_on_the_device(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", per_class=12, suffix=".jpg")
    train = load("folder", root, loader="dali", device=CUDA, num_workers=2).train
    whole = [b.x.clone() for b in train.epoch(0)]
    batches: Any = train.epoch(0)
    next(batches)
    batches.close()
    for start in range(len(train)):
        resumed = [b.x for b in train.epoch(0, start)]
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@needs_dali
def test_no_batch_of_an_array_waits_for_the_steps_before_it() -> None:
    train = load("digits", loader="dali", device=CUDA, batch_size=200).train
    list(train.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(train.epoch(1))) == len(train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
