"""Philox inside Triton kernels."""

# Kernel arguments have Triton's types, which annotations cannot say.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(
    rng_ptr,  # (2,) int64: seed, offset
    index,  # int64 block
    stream: tl.constexpr,
):
    """Four blocks of uint32 words, as ``arat_kernels.philox.reference.random_words``."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    zero = tl.zeros_like(index)
    c2 = zero + (offset & 0xFFFFFFFF)
    c3 = zero + (((offset >> 32) & 0xFFFFFFFF) ^ stream)
    return tl.philox(
        seed,
        (index & 0xFFFFFFFF).to(tl.uint32),
        ((index >> 32) & 0xFFFFFFFF).to(tl.uint32),
        c2.to(tl.uint32),
        c3.to(tl.uint32),
    )


@triton.jit
def unit(word):
    """[0, 1) in float32 from a 32-bit word, in steps of 2^-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def interleave(w0, w1, w2, w3, n: tl.constexpr):
    """(4 * n,) from four (n,) blocks: w0[0], w1[0], w2[0], w3[0], w0[1], ..."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * n)
