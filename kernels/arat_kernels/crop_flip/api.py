"""Public functions: argument checks, choice of the implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arat_kernels.crop_flip.reference import crop_flip_reference, draw_crop_flip_reference
from arat_kernels.implementation import Impl, choose
from arat_kernels.philox.reference import check_rng

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (torch.contiguous_format, torch.channels_last)


def crop_flip(
    images: Tensor,
    index: Tensor,
    *,
    padding: int = 0,
    flip: bool = False,
    rng: Tensor | None = None,
    offsets: Tensor | None = None,
    max_value: float = 255.0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    impl: Impl | None = None,
) -> Tensor:
    """Gather images by index, crop them at random places of their zero-padded selves, mirror some,
    and convert them to ``value / max_value``, in one pass.

    Where to crop and what to mirror is either drawn from ``rng``, a function of it and of the place
    in the batch, the same on every device (:func:`draw_crop_flip`), or given as ``offsets``; with
    neither, images are only gathered and converted. ``rng`` is read on the device and not changed:
    advance it after use (``rng[1].add_(1)``), inside the CUDA graph if there is one.

    Args:
        images: (M, C, H, W), uint8; any strides.
        index: (N,), int64 (an int32 one is converted first), in [0, M); an image whose index is
            not becomes NaN, for the host does not look.
        padding: zeros on each side before a crop of the image's own size, >= 0.
        flip: mirror each image horizontally with probability 1/2; with ``rng`` only.
        rng: (2,) int64: seed and offset.
        offsets: (N, 3) int32: the crop's first row and column in the padded image, in
            [0, 2 * padding], and 1 to mirror it.
        max_value: the value that becomes 1.0, finite and > 0.
        dtype: of the result: float32, bfloat16 or float16.
        memory_format: of the result: channels_last or contiguous.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: a shape, a dtype, a device or a value does not fit; the message holds got and
            expected.

    Source: the augmentation of He et al., CVPR 2016 (arXiv 1512.03385), section 4.2.
    """
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be (M, C, H, W) uint8, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"index must be (N,) int64 or int32, got {index.dtype} of shape {tuple(index.shape)}"
        )
    _check_padding(padding)
    if rng is not None and offsets is not None:
        raise ValueError("either rng or offsets is expected, got both")
    if rng is not None:
        check_rng(rng)
    if offsets is not None:
        expected = (index.shape[0], 3)
        if tuple(offsets.shape) != expected or offsets.dtype != torch.int32:
            raise ValueError(
                f"offsets must be (N, 3) = {expected} int32, "
                f"got {offsets.dtype} of shape {tuple(offsets.shape)}"
            )
    if rng is None and (flip or (padding and offsets is None)):
        raise ValueError(
            f"rng is expected for a random crop or flip, got None with padding={padding}, "
            f"flip={flip}"
        )
    if not (math.isfinite(max_value) and max_value > 0):
        raise ValueError(f"max_value must be finite and > 0, got {max_value}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype}")
    if memory_format not in _FORMATS:
        raise ValueError(f"memory_format must be one of {_FORMATS}, got {memory_format}")
    channels_last = memory_format == torch.channels_last
    arguments = (
        images, index, rng, offsets, padding, flip, max_value, dtype, channels_last
    )  # fmt: skip
    if choose(impl, images, index, rng, offsets, operation="crop_flip") == "triton":
        from arat_kernels.crop_flip.triton import forward

        x: Tensor = forward(*arguments)
        return x
    return crop_flip_reference(*arguments)


def draw_crop_flip(rng: Tensor, num: int, *, padding: int, flip: bool) -> Tensor:
    """The ``offsets`` that :func:`crop_flip` draws from ``rng`` for a batch of ``num``.

    Args:
        rng: (2,) int64: seed and offset.
        num: images in the batch, >= 0.
        padding: as for :func:`crop_flip`, >= 0.
        flip: as for :func:`crop_flip`; False leaves the last column 0.

    Returns:
        (num, 3) int32 on ``rng``'s device.

    Raises:
        ValueError: ``rng``, ``num`` or ``padding`` does not fit.
    """
    check_rng(rng)
    _check_padding(padding)
    if num < 0:
        raise ValueError(f"num must be >= 0, got {num}")
    return draw_crop_flip_reference(rng, num, padding, flip)


def _check_padding(padding: int) -> None:
    if not 0 <= padding < 2**15:
        raise ValueError(f"padding must be in [0, 32768), got {padding}")
