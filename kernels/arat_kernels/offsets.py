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
