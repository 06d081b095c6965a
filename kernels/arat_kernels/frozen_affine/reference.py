"""Plain PyTorch definition of the affine map with constants; any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.forks import spread
from arat_kernels.implementation import wide_dtype


def frozen_affine_reference(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.frozen_affine.api.frozen_affine`."""
    wide = x.to(wide_dtype(x))
    per_channel = (-1, *[1] * (x.ndim - 2))
    if scale is not None:
        wide = wide * scale.detach().to(wide.dtype).view(per_channel)
    wide = wide + shift.detach().to(wide.dtype).view(per_channel)
    if residual is not None:
        wide = wide + residual.to(wide.dtype)
    # Rounded first, so that the gradient is masked by the output that is saved.
    y = wide.to(x.dtype)
    return y.relu() if relu else y


def relu_backward_reference(dy: Tensor, y: Tensor, dy_skip: Tensor | None) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.frozen_affine.api.relu_backward`."""
    wide = wide_dtype(dy)
    if dy_skip is not None and dy_skip.shape != dy.shape:
        dy_skip = spread(dy_skip, dy.shape)
    total = dy if dy_skip is None else (dy.to(wide) + dy_skip.to(wide)).to(dy.dtype)
    masked: Tensor = torch.ops.aten.threshold_backward(total, y, 0)
    return masked
