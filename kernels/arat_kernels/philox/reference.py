"""Philox in plain PyTorch, bit for bit what the kernels draw."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10


def check_rng(rng: Tensor) -> None:
    """Raise ValueError unless ``rng`` is an int64 tensor ``[seed, offset]``."""
    if rng.dtype != torch.int64 or tuple(rng.shape) != (2,) or not rng.is_contiguous():
        raise ValueError(
            "rng must be a contiguous int64 tensor [seed, offset], "
            f"got {rng.dtype} of shape {tuple(rng.shape)}"
        )


def random_words(rng: Tensor, index: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for every index.

    Args:
        rng: (2,) int64, seed and offset.
        index: int64, any shape, >= 0; distinct indices give independent words.
        stream: which use this is, one of :mod:`arat_kernels.philox.streams`.

    Returns:
        Four int64 tensors of ``index``'s shape, values in [0, 2^32).

    Raises:
        ValueError: ``rng`` is no such tensor.
    """
    check_rng(rng)
    seed, offset = rng[0], rng[1]
    c0, c1 = index & _LOW, (index >> 32) & _LOW
    c2 = (offset & _LOW).expand_as(index)
    c3 = (((offset >> 32) & _LOW) ^ stream).expand_as(index)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_NUM_ROUNDS):
        # The product of two 32-bit words wraps around in int64; its 64 bits are right all the same.
        b, a = c2 * _ROUND_B, c0 * _ROUND_A
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1, c2, c3
