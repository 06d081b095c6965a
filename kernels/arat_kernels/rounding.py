"""Rounding inside Triton kernels."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are values of Triton, which have no Python type.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(value):
    """float32 rounded to the nearest bfloat16, ties to even; the interpreter's cast truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # A GPU's NaN, 0x7FFFFFFF, would be carried over into -0.
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
