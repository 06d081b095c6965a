"""Batch assembly from a dataset on the card, against PyTorch indexing and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_kernels.crop_flip import crop_flip, draw_crop_flip

PADDING = 4
OUTPUTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bf16 split": {"dtype": torch.bfloat16, "split": True},
}


def eager(images: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """The usual gather with index tensors, float32 channels_last."""
    size = images.shape[2]
    grid = torch.arange(size, device=images.device)
    rows = grid + offsets[:, :1]
    cols = torch.where(offsets[:, 2:] != 0, size - 1 - grid, grid) + offsets[:, 1:2]
    padded = torch.nn.functional.pad(images[index], (PADDING,) * 4)
    sample = torch.arange(len(index), device=images.device)[:, None, None]
    crops = padded[sample, :, rows[:, :, None], cols[:, None, :]]
    return (crops.float() / 255).permute(0, 3, 1, 2)


def eager_split(images: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    x = eager(images, index, offsets)
    high = x.bfloat16()
    low = (x - high.float()).bfloat16()
    parts = torch.cat([high, low, high.new_zeros(len(x), 2, *x.shape[2:])], 1)
    return parts.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num", [512, 4096])
@pytest.mark.parametrize("output", OUTPUTS)
def test_batch(compare: Callable[..., None], num: int, output: str) -> None:
    numbers = torch.Generator("cuda").manual_seed(0)
    images = torch.randint(
        256, (50_000, 3, 32, 32), generator=numbers, device="cuda", dtype=torch.uint8
    )
    rng = torch.tensor([1, 2], device="cuda")
    offsets = draw_crop_flip(rng, num, padding=PADDING, flip=True)
    indices = [torch.randint(50_000, (num,), generator=numbers, device="cuda") for _ in range(20)]
    plain = eager_split if output == "bf16 split" else eager
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True)
    contestants: dict[str, list[Any]] = {
        "crop_flip": [
            lambda i=i: crop_flip(images, i, padding=PADDING, flip=True, rng=rng, **OUTPUTS[output])
            for i in indices
        ],
        "PyTorch eager": [lambda i=i: plain(images, i, offsets) for i in indices],
        "torch.compile": [lambda i=i: compiled(images, i, offsets) for i in indices],
    }
    expected = plain(images, indices[0], offsets)
    for name, calls in contestants.items():
        error = (calls[0]().float() - expected.float()).abs().max()
        assert error < 1e-3, f"{name} is off by {error}: its time would mean nothing"
    moved = num * 1024 * (3 + (16 if output == "bf16 split" else 12))
    compare(contestants, moved, "crop_flip")
