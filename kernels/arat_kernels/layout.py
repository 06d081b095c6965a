"""Memory layouts that kernels can walk in memory order."""

from __future__ import annotations

import torch
from torch import Tensor


def is_batch_dense(t: Tensor) -> bool:
    """Whether ``t`` fills its memory without gaps and its first dimension is the outermost:
    contiguous, or channels_last."""
    return t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last))


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order (strides of dimensions of
    size 1 mean nothing)."""
    return all(
        p == q for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def in_layout_of(t: Tensor, model: Tensor) -> Tensor:
    """``t`` itself if it lies in memory as ``model`` (dense, same shape) does, else a copy that
    does."""
    if same_strides(t, model):
        return t
    return torch.empty_like(model, dtype=t.dtype).copy_(t)
