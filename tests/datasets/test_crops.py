"""Crops on a CPU are those of the definition, and batches that are held keep their pixels."""

from __future__ import annotations

import pytest
import torch

from arat_fast.data.batches import ResidentBatches, draw_crop_flip
from arat_fast.data.crops import Buffers, CropFlip, to_unit_range
from arat_kernels.crop_flip import crop_flip

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def pixels(number: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (number, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", LAYOUTS)
def test_crops_are_those_of_the_definition(
    padding: int, channels: int, layout: torch.memory_format, stored: torch.memory_format
) -> None:
    made = CropFlip(padding, 200, layout)
    # One after the other through the same memory: smaller, larger, and of another shape.
    for number, size in ((5, (6, 9)), (3, (6, 9)), (8, (6, 9)), (8, (7, 5)), (1, (6, 9))):
        images = pixels(20, channels, *size).contiguous(memory_format=stored)
        generator = torch.Generator().manual_seed(number)
        index = torch.randint(20, (number,), generator=generator)
        draws = draw_crop_flip(number, padding, generator)
        x = made(images, index, draws)
        expected = crop_flip(images, index, padding=padding, offsets=draws, max_value=200)
        assert torch.equal(x, expected)
        assert x.is_contiguous(memory_format=layout)


def test_batches_that_are_held_keep_their_pixels() -> None:
    images, labels = pixels(70, 3, 8, 8), torch.zeros(70, dtype=torch.int64)
    batches = ResidentBatches(
        images, labels, ("a",), batch_size=4, shuffle=True, padding=2, flip=True
    )
    seen = [batch.x.clone() for batch in batches.epoch(0)]
    held = [batch.x for batch in batches.epoch(0)]
    assert len(held) > 2 * Buffers.KEPT
    assert all(torch.equal(a, b) for a, b in zip(seen, held, strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_memory_is_used_again_once_nothing_holds_it() -> None:
    buffers = Buffers()
    first = buffers.empty((4, 3), torch.float32)
    place = first.data_ptr()
    part = first[1].numpy()
    del first
    # A view in NumPy still shows what was there.
    other = buffers.empty((4, 3), torch.float32)
    assert other.data_ptr() != place
    del part
    again = buffers.empty((2, 5), torch.float32)
    assert again.data_ptr() == place
    del again
    bytes_of_it = buffers.empty((48,), torch.uint8)
    assert bytes_of_it.data_ptr() == place


def test_no_more_memory_is_kept_than_said() -> None:
    buffers = Buffers()
    held = [buffers.empty((10,), torch.float32) for _ in range(3 * Buffers.KEPT)]
    assert len({x.data_ptr() for x in held}) == len(held)
    places = {x.data_ptr() for x in held[-Buffers.KEPT :]}
    held.clear()
    held = [buffers.empty((10,), torch.float32) for _ in range(Buffers.KEPT)]
    assert {x.data_ptr() for x in held} == places


def test_unit_range_is_the_division() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(2, 128).t()
    assert torch.equal(to_unit_range(levels, 255, Buffers()), levels / 255)
