"""Plain PyTorch definition of the batch assembly; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.philox.reference import random_words
from arat_kernels.philox.streams import CROP_FLIP


def crop_flip_reference(
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
    num, device = index.shape[0], images.device
    num_images, channels, height, width = images.shape
    if rng is not None:
        offsets = draw_crop_flip_reference(rng, num, padding, flip)
    if offsets is None:
        offsets = torch.tensor([[padding, padding, 0]], device=device).expand(num, 3)
    top, left, mirrored = offsets.long().view(num, 3, 1).unbind(1)
    row = torch.arange(height, device=device) + top - padding
    col = torch.arange(width, device=device) + left - padding
    inside = _in_range(row, height)[:, :, None] & _in_range(col, width)[:, None, :]
    known = _in_range(index, num_images)
    if num_images == 0:
        pixels = images.new_zeros(num, height, width, channels)
    else:
        pixels = _crops(
            images.permute(0, 2, 3, 1).index_select(0, torch.where(known, index, 0)),
            row.clamp(0, max(height - 1, 0)),
            (left - padding).clamp(-width, width),
        )
    pixels = pixels * inside[..., None]
    pixels = torch.where(mirrored[:, :, None, None] != 0, pixels.flip(2), pixels)
    # By a tensor on the same device: by a number CUDA multiplies with the reciprocal. Unknown
    # images become NaN.
    values = pixels.float()
    values /= torch.where(known, max_value, torch.nan).float().view(num, 1, 1, 1)
    x = values.to(dtype).permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()


def draw_crop_flip_reference(rng: Tensor, num: int, padding: int, flip: bool) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.crop_flip.api.draw_crop_flip`."""
    w0, w1, w2, _ = random_words(rng, torch.arange(num, device=rng.device), CROP_FLIP)
    places = 2 * padding + 1
    mirrored = (w2 >> 31) * flip
    return torch.stack([(w0 * places) >> 32, (w1 * places) >> 32, mirrored], 1).int()


def _crops(images: Tensor, row: Tensor, shift: Tensor) -> Tensor:
    """Rows ``row`` (N, H) of images (N, H, W, C), W pixels of each from column ``shift`` (N, 1) on;
    columns outside of the image hold anything.

    Each is one piece of memory, copied at once: a pixel at a time is several times slower.
    """
    num, height, width, channels = images.shape
    length = width * channels
    margin = images.new_zeros(length)
    memory = torch.cat([margin, images.flatten(), margin])
    pieces = memory.as_strided((len(memory) - length + 1, length), (1, 1))
    image = torch.arange(num, device=images.device).view(num, 1)
    start = ((image * height + row) * width + shift) * channels + length
    return pieces.index_select(0, start.flatten()).view(num, height, width, channels)


def _in_range(t: Tensor, end: int) -> Tensor:
    return (t >= 0) & (t < end)
