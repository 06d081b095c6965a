"""The batch assembly's reference and the checks of its public functions."""

from __future__ import annotations

import math

import torch

from arat_kernels.checks import generator
from arat_kernels.crop_flip import crop_flip, draw_crop_flip

IMAGES = torch.randint(256, (6, 3, 8, 9), generator=generator(0), dtype=torch.uint8)
INDEX = torch.tensor([5, 0, 3, 3])
RNG = torch.tensor([11, 12])


def test_is_pad_crop_and_flip() -> None:
    offsets = draw_crop_flip(RNG, 4, padding=2, flip=True)
    got = crop_flip(IMAGES, INDEX, padding=2, flip=True, rng=RNG)
    for i, (top, left, mirrored) in enumerate(offsets.tolist()):
        padded = torch.nn.functional.pad(IMAGES[INDEX[i]], (2, 2, 2, 2))
        expected = padded[:, top : top + 8, left : left + 9].float() / 255
        assert torch.equal(got[i], expected.flip(2) if mirrored else expected)


def test_without_draws_is_gather_and_division() -> None:
    got = crop_flip(IMAGES, INDEX, max_value=16, memory_format=torch.contiguous_format)
    assert torch.equal(got, IMAGES[INDEX].float() / 16)
    assert got.is_contiguous()


def test_draws_are_uniform_and_follow_the_state() -> None:
    num, padding = 40_000, 4
    draws = draw_crop_flip(RNG, num, padding=padding, flip=True)
    for column, places in ((0, 9), (1, 9), (2, 2)):
        counts = torch.bincount(draws[:, column], minlength=places).double()
        assert len(counts) == places
        chi_squared = float(((counts - num / places) ** 2 / (num / places)).sum())
        assert chi_squared < places - 1 + 5 * math.sqrt(2 * (places - 1))
    assert abs(float(torch.corrcoef(draws.T.double())[0, 1])) < 5 / math.sqrt(num)
    for other in ([11, 13], [12, 12]):
        same = (draw_crop_flip(torch.tensor(other), num, padding=4, flip=True) == draws).all(1)
        assert same.double().mean() < 0.02
    assert torch.equal(draws[:100], draw_crop_flip(RNG, 100, padding=padding, flip=True))


def test_without_flip_nothing_is_mirrored() -> None:
    with_flip = draw_crop_flip(RNG, 50, padding=3, flip=True)
    without = draw_crop_flip(RNG, 50, padding=3, flip=False)
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert without[:, 2].sum() == 0 < with_flip[:, 2].sum()
