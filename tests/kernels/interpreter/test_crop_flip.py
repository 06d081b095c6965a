"""The batch assembly kernel in Triton's interpreter: bit for bit the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.operations import assert_equal, crops
from kernels.support import few
from torch import Tensor

from arat_kernels.crop_flip import crop_flip, draw_crop_flip
from arat_kernels.layout import same_strides

OUTPUTS: list[dict[str, Any]] = [
    {"dtype": dtype, "memory_format": memory_format}
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for memory_format in (torch.channels_last, torch.contiguous_format)
] + [{"dtype": torch.bfloat16, "split": True}]


def assert_same(tensors: tuple[Tensor, ...], **options: Any) -> Tensor:
    """Both implementations agree in every bit and stride."""
    got, expected = (crop_flip(*tensors, impl=impl, **options) for impl in ("triton", "reference"))
    assert got.dtype == expected.dtype
    assert got.numel() == 0 or same_strides(got, expected)
    assert_equal({"": got}, {"": expected})
    return got


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("stored", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_the_reference(output: dict[str, Any], stored: torch.memory_format) -> None:
    images, index, rng = crops().make(0, torch.float32).values()
    images = images.to(memory_format=stored)
    drawn = assert_same((images, index), padding=3, flip=True, rng=rng, **output)
    offsets = draw_crop_flip(rng, 5, padding=3, flip=True)
    given = assert_same((images, index), padding=3, offsets=offsets, **output)
    assert torch.equal(given, drawn)
    assert not torch.equal(assert_same((images, index), **output), drawn)


@few(15)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    num=st.integers(0, 5),
    padding=st.integers(0, 10),
    flip=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    seed=st.integers(0, 99),
)
def test_any_shape(
    shape: tuple[int, ...], num: int, seed: int, output: dict[str, Any], padding: int, flip: bool
) -> None:
    images, index, rng = crops(shape, num).make(seed, torch.float32).values()
    assert_same((images, index), padding=padding, flip=flip, rng=rng, **output)


def test_strided_images_and_narrow_indices() -> None:
    images, index, rng = crops((6, 4, 9, 8)).make(1, torch.float32).values()
    images, index = images[::2, 1:, :, ::2], (index.int() % 3).repeat_interleave(2)[::2]
    assert_same((images, index), padding=2, flip=True, rng=rng)
