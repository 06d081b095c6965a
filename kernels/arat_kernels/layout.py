"""Memory layouts that kernels can walk in memory order, from a multiple of 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_batch_dense(t: Tensor) -> bool:
    """Whether ``t`` fills its memory without gaps and its first dimension is the outermost:
    contiguous, or channels_last."""
    return t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last))


def batch_dense(t: Tensor) -> Tensor:
    """``t`` itself if it :func:`is_batch_dense`, else a contiguous copy."""
    return t if is_batch_dense(t) else t.contiguous()


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order (strides of dimensions of
    size 1 mean nothing)."""
    return all(
        p == q for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def aligned(t: Tensor) -> Tensor:
    """``t`` itself if it begins at a multiple of 16 bytes, as allocations do, else (a slice at an
    odd place) a copy; kernels are compiled for such pointers alone."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def all_aligned(*tensors: Tensor | None) -> list[Tensor | None]:
    """:func:`aligned` for several tensors, of which some may be missing."""
    return [None if t is None else aligned(t) for t in tensors]


def in_layout_of(t: Tensor, model: Tensor) -> Tensor:
    """``t`` itself if it is :func:`aligned` and lies in memory as ``model`` (dense, same shape)
    does, else a copy that does."""
    if same_strides(t, model):
        return aligned(t)
    return torch.empty_like(model, dtype=t.dtype).copy_(t)
