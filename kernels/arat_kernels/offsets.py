"""Offsets into tensors of more than 2^31 elements, inside Triton kernels.

A kernel widens an index itself only where it needs all 64 bits for more than the offset (to compare
it with a 64-bit count, or as a random number's position); :func:`start_of` then leaves it as it is.
"""

# Kernel arguments have Triton's types, which annotations cannot say.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_of(index, size):
    """First element of ``index``, a scalar or a block, of pieces of ``size`` elements; 64 bits."""
    return index.to(tl.int64) * size


@triton.jit
def load_second_gradient(ptr, at, ok, first, r, c, channels, height, width):
    """A tile at ``at`` of a second gradient of (N·H·W, C), rows ``first`` (64 bits) + ``r`` and
    columns ``c``; if there is a width, it has every second pixel both ways, others are zeros."""
    if width is not None:
        area = height * width
        pixel = (first % area).to(tl.int32) + r
        image = first // area + pixel // area
        y, x = pixel % area // width, pixel % width
        few_x = (width + 1) // 2
        few = image * ((height + 1) // 2 * few_x) + (y // 2 * few_x + x // 2)
        ok &= ((y % 2 == 0) & (x % 2 == 0))[:, None]
        at = start_of(few, channels)[:, None] + c[None, :]
    return tl.load(ptr + at, mask=ok, other=0.0)
