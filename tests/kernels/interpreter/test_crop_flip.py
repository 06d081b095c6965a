"""The batch assembly kernel in Triton's interpreter: bit for bit the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import few, generator
from torch import Tensor

from arat_kernels.crop_flip import crop_flip, draw_crop_flip
from arat_kernels.crop_flip.triton import _crop_flip_op
from arat_kernels.layout import same_strides

OUTPUTS = [
    {"dtype": dtype, "memory_format": memory_format}
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for memory_format in (torch.channels_last, torch.contiguous_format)
] + [{"dtype": torch.bfloat16, "split": True}]


def case(
    num_images: int, channels: int, height: int, width: int, num: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    images = torch.randint(
        256, (num_images, channels, height, width), generator=source, dtype=torch.uint8
    )
    return images, torch.randint(num_images, (num,), generator=source)


def assert_identical(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.numel() == 0 or same_strides(got, expected)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("stored", [torch.contiguous_format, torch.channels_last])
def test_equals_the_reference(output: dict[str, object], stored: torch.memory_format) -> None:
    images, index = case(7, 3, 10, 12, 5)
    images = images.to(memory_format=stored)
    rng = torch.tensor([2**40 + 1, 2**33 + 7])
    got = crop_flip(images, index, padding=3, flip=True, rng=rng, impl="triton", **output)
    expected = crop_flip(images, index, padding=3, flip=True, rng=rng, impl="reference", **output)
    assert_identical(got, expected)
    offsets = draw_crop_flip(rng, 5, padding=3, flip=True)
    assert_identical(
        crop_flip(images, index, padding=3, offsets=offsets, impl="triton", **output), expected
    )
    plain = crop_flip(images, index, impl="triton", **output)
    assert_identical(plain, crop_flip(images, index, impl="reference", **output))
    assert not torch.equal(plain, got)


@few(15)
@given(
    num_images=st.integers(1, 4),
    channels=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    num=st.integers(0, 5),
    padding=st.integers(0, 10),
    flip=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    seed=st.integers(0, 99),
)
def test_any_shape(
    num_images: int,
    channels: int,
    height: int,
    width: int,
    num: int,
    padding: int,
    flip: bool,
    output: dict[str, object],
    seed: int,
) -> None:
    images, index = case(num_images, channels, height, width, num, seed)
    arguments = {"padding": padding, "flip": flip, "rng": torch.tensor([seed, 3]), **output}
    got = crop_flip(images, index, impl="triton", **arguments)
    assert_identical(got, crop_flip(images, index, impl="reference", **arguments))


def test_strided_images_and_narrow_indices() -> None:
    images, index = case(6, 4, 9, 8, 5)
    images, index = images[::2, 1:, :, ::2], (index.int() % 3).repeat_interleave(2)[::2]
    rng = torch.tensor([1, 1])
    got = crop_flip(images, index, padding=2, flip=True, rng=rng, impl="triton")
    assert_identical(got, crop_flip(images, index, padding=2, flip=True, rng=rng, impl="reference"))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[-1]], ids=str)
def test_unknown_index_gives_nan(impl: str, output: dict[str, object]) -> None:
    images, _ = case(4, 3, 5, 5, 1)
    index = torch.tensor([0, 4, -1, 3])
    got = crop_flip(images, index, padding=1, rng=torch.tensor([1, 2]), impl=impl, **output)
    bad = got[:, :3].isnan()
    assert bad[[1, 2]].all() and not bad[[0, 3]].any()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_offsets_beyond_the_padding_show_zeros(impl: str) -> None:
    images, index = case(2, 3, 4, 4, 2)
    offsets = torch.tensor([[100, 0, 0], [1, -50, 1]], dtype=torch.int32)
    got = crop_flip(images, index, padding=1, offsets=offsets, impl=impl)
    assert torch.equal(got, torch.zeros(2, 3, 4, 4))


def test_operator_passes_opcheck() -> None:
    images, index = case(4, 3, 5, 5, 2)
    rng = torch.tensor([1, 2])
    offsets = torch.tensor([[0, 2, 1], [1, 1, 0]], dtype=torch.int32)
    torch.library.opcheck(
        _crop_flip_op, (images, index, rng, None, 1, True, 255.0, torch.float32, False, False)
    )
    torch.library.opcheck(
        _crop_flip_op, (images, index, None, offsets, 1, False, 16.0, torch.bfloat16, True, True)
    )


def test_compiles_to_one_graph() -> None:
    images, index = case(4, 3, 5, 5, 2)

    def batch(index: Tensor, rng: Tensor) -> Tensor:
        return crop_flip(images, index, padding=2, flip=True, rng=rng, impl="triton") * 2

    compiled = torch.compile(batch, fullgraph=True, backend="aot_eager")
    for offset in range(3):
        rng = torch.tensor([1, offset])
        assert torch.equal(compiled(index, rng), batch(index, rng))
