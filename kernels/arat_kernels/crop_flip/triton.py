"""Triton implementation of the batch assembly."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.implementation import warps
from arat_kernels.offsets import start_of
from arat_kernels.philox import device as philox
from arat_kernels.philox import streams
from arat_kernels.rounding import round_to_bf16

_STREAM: tl.constexpr = tl.constexpr(streams.CROP_FLIP)


@triton.jit
def _draw(rng_ptr, sample, places):
    """First row and column of the crop in [0, places), and the flip bit."""
    w0, w1, w2, _ = philox.random_words(rng_ptr, sample + tl.zeros((1,), tl.int64), _STREAM)
    places = (tl.zeros((1,), tl.int32) + places).to(tl.uint32)
    top = tl.sum(tl.umulhi(w0, places).to(tl.int32))
    left = tl.sum(tl.umulhi(w1, places).to(tl.int32))
    return top, left, tl.sum((w2 >> 31).to(tl.int32))


# Neither integers nor pointers whose elements are read one by one are specialised on their value.
_PLAIN = [
    "images_ptr", "index_ptr", "rng_ptr", "offsets_ptr", "num_images", "height", "width",
    "image_stride", "channel_stride", "row_stride", "col_stride", "size", "padding",
]  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN)
def crop_flip_kernel(
    images_ptr,  # (num_images, CHANNELS, height, width) uint8, strides below
    index_ptr,  # (N,) int64 or int32
    rng_ptr,  # (2,) int64: seed, offset; or None
    offsets_ptr,  # (N, 3) int32, contiguous: first row, first column, mirrored; or None
    x_ptr,  # (N, size) any float: (height, width, CHANNELS), or the channels first
    num_images: tl.int64,
    height: tl.int32,
    width: tl.int32,
    image_stride: tl.int64,
    channel_stride: tl.int64,
    row_stride: tl.int64,
    col_stride: tl.int64,
    size: tl.int32,  # CHANNELS * height * width
    padding: tl.int32,
    max_value,
    ALIGNED: tl.constexpr,  # size is a multiple of 16
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        size = size // 16 * 16
    sample = tl.program_id(0).to(tl.int64)
    image = tl.load(index_ptr + sample).to(tl.int64)
    top = padding
    left = padding
    mirrored = 0
    if rng_ptr is not None:
        top, left, mirrored = _draw(rng_ptr, sample, 2 * padding + 1)
        if not FLIP:
            mirrored = 0
    if offsets_ptr is not None:
        top = tl.load(offsets_ptr + 3 * sample)
        left = tl.load(offsets_ptr + 3 * sample + 1)
        mirrored = tl.load(offsets_ptr + 3 * sample + 2)

    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channel = at % CHANNELS
        pixel = at // CHANNELS
    else:
        channel = at // (height * width)
        pixel = at % (height * width)
    row = pixel // width
    col = pixel % width
    row = row + top - padding
    col = tl.where(mirrored != 0, width - 1 - col, col) + left - padding
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width) & (at < size)
    known = (image >= 0) & (image < num_images)
    offset = (
        start_of(image, image_stride)
        + channel * channel_stride
        + row * row_stride
        + col * col_stride
    )
    value = tl.load(images_ptr + offset, inside & known, other=0).to(tl.float32)
    # Rounded once, which a product with 1 / max_value is not.
    value = tl.div_rn(value, tl.zeros_like(value) + max_value)
    value = tl.where(known, value, float("nan"))
    if x_ptr.dtype.element_ty == tl.bfloat16:
        value = round_to_bf16(value)
    tl.store(x_ptr + start_of(sample, size) + at, value.to(x_ptr.dtype.element_ty), at < size)


# Eight neighbours of the output per thread; the bytes that are read come from the L1, where their
# line stays.
BLOCK, NUM_WARPS = 1024, 4


@torch.library.custom_op("arat_kernels::crop_flip", mutates_args=())
def forward(
    images: Tensor,
    index: Tensor,
    rng: Tensor | None,
    offsets: Tensor | None,
    padding: int,
    flip: bool,
    max_value: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.crop_flip.api.crop_flip`."""
    x = _allocate(images, index, dtype, channels_last)
    if x.numel() == 0:
        return x
    num_images, channels, height, width = images.shape
    size = x[0].numel()
    with torch.cuda.device_of(images):
        crop_flip_kernel[(x.shape[0], triton.cdiv(size, BLOCK))](
            images,
            index.long().contiguous(),
            rng,
            None if offsets is None else offsets.contiguous(),
            x,
            num_images,
            height,
            width,
            *images.stride(),
            size,
            padding,
            float(max_value),
            size % 16 == 0,
            channels,
            channels_last,
            flip,
            BLOCK,
            num_warps=warps(NUM_WARPS),
        )
    return x


def _allocate(images: Tensor, index: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    _, channels, height, width = images.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (index.shape[0], channels, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=memory_format,
    )


forward.register_fake(lambda images, index, *given: _allocate(images, index, *given[-2:]))
