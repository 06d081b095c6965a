"""Public function: argument checks, choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.image_parts.reference import image_parts_reference
from arat_kernels.implementation import Impl, choose


def image_parts(x: Tensor, *, impl: Impl | None = None) -> Tensor:
    """``x`` as two bfloat16 parts side by side, so that a convolution in bfloat16 loses nothing of
    an adversarial perturbation.

    Channels 0 … C-1 hold the value rounded to bfloat16, the next C what the rounding left, the rest
    0; their number is 2 C rounded up to a multiple of 8, as tensor cores like it. High and low part
    add up to ``x`` within 2^-16 of its size. The gradient of ``x`` is that of the high part.

    Args:
        x: (N, C, H, W), float32; channels_last is fastest.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        (N, 8 k, H, W), bfloat16, channels_last.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the message holds got and expected.
    """
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"x must be (N, C, H, W) float32, got {x.dtype} of shape {tuple(x.shape)}")
    if choose(impl, x, operation="image_parts") == "triton":
        from arat_kernels.image_parts.triton import forward

        parts: Tensor = forward(x)
        return parts
    return image_parts_reference(x)
