"""Triton implementation of the parts of images."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.implementation import warps
from arat_kernels.layout import aligned
from arat_kernels.offsets import start_of
from arat_kernels.rounding import round_to_bf16


@triton.jit(do_not_specialize=["numel"])
def image_parts_fwd_kernel(
    x_ptr,  # (N*H*W, CHANNELS) float32
    parts_ptr,  # (N*H*W, OUT_CHANNELS) bfloat16
    numel: tl.int64,  # of the parts
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,  # a multiple of 8
    BLOCK: tl.constexpr,
):
    numel = numel // 8 * 8
    at = start_of(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    channel = at % OUT_CHANNELS
    source = tl.where(channel < CHANNELS, channel, channel - CHANNELS)
    ok = (source < CHANNELS) & (at < numel)
    # Wide, for more than 2^31 elements.
    value = tl.load(x_ptr + start_of(at // OUT_CHANNELS, CHANNELS) + source, ok, other=0.0)
    high = round_to_bf16(value)
    value = tl.where(channel < CHANNELS, high, value - high)
    tl.store(parts_ptr + at, round_to_bf16(value).to(tl.bfloat16), at < numel)


# Eight neighbours per thread: a pixel with three channels, a vector of 16 bytes.
BLOCK, NUM_WARPS = 1024, 4


@torch.library.custom_op("arat_kernels::image_parts", mutates_args=())
def forward(x: Tensor) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.image_parts.api.image_parts`."""
    x = aligned(x.contiguous(memory_format=torch.channels_last))
    parts: Tensor = _allocate(x)
    if x.numel() == 0:
        return parts
    with torch.cuda.device_of(x):
        image_parts_fwd_kernel[(triton.cdiv(parts.numel(), BLOCK),)](
            x,
            parts,
            parts.numel(),
            x.shape[1],
            parts.shape[1],
            BLOCK,
            num_warps=warps(NUM_WARPS),
        )
    return parts


@forward.register_fake
def _allocate(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    size = (n, -(-2 * channels // 8) * 8, height, width)
    return torch.empty(
        size, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.channels = inputs[0].shape[1]


def _backward(ctx: Any, dparts: Tensor) -> Tensor:
    high = dparts[:, : ctx.channels]
    return high.to(torch.float32, memory_format=torch.channels_last)


forward.register_autograd(_backward, setup_context=_setup_context)
