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

    A channels_last ``x`` with an attribute ``_parts``, at first None, keeps its parts there: a leaf
    of autograd, at which gradients stop, for an attack that moves the image and its parts together
    (``parts`` of :func:`arat_kernels.pgd_step.pgd_step`).

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
    keeps = (
        not torch.compiler.is_compiling()
        and "_parts" in vars(x)
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    kept: Tensor | None = vars(x)["_parts"] if keeps else None
    if kept is not None:
        return kept
    source = x.detach() if keeps else x
    if choose(impl, x, operation="image_parts") == "triton":
        from arat_kernels.image_parts.triton import forward

        parts: Tensor = forward(source)
    else:
        parts = image_parts_reference(source)
    if keeps:
        x._parts = parts.requires_grad_()  # type: ignore[attr-defined]  # any attribute of a tensor
    return parts
