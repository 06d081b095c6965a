"""Plain PyTorch definition of split BatchNorm; differentiable by autograd, any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_kernels.split_batch_norm.distributed import (
    differentiable_sum_over_group,
    move_running_statistics,
    sum_over_group,
)


def split_batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    *,
    training: bool,
    update_running_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    return_pooled: bool,
    group_name: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in :func:`arat_kernels.split_batch_norm.api.split_batch_norm`."""
    if training and group_name is not None:
        y = _normalize_over_group(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            sizes,
            update_running_stats,
            momentum,
            eps,
            group_name,
        )
    else:
        y = _normalize(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            sizes,
            training,
            update_running_stats,
            momentum,
            eps,
        )
    pooled = None
    if return_pooled:
        wide = y if y.dtype == torch.float64 else y.float()
        pooled = wide.relu().mean(dim=(2, 3))
    # In place: no backward reads the normalised value.
    if residual is not None:
        y += residual
    if relu:
        y.relu_()
    return y, pooled


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    training: bool,
    update_running_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    use_running = not training or update_running_stats
    # Whole, or split: the gradient of a slice is a tensor of zeros in another layout.
    present = [branch for branch, size in enumerate(sizes) if size]
    parts = [x] if len(present) == 1 else torch.split(x, list(sizes))
    branches = [
        F.batch_norm(
            part,
            running_mean[branch] if use_running else None,
            running_var[branch] if use_running else None,
            None if weight is None else weight[branch],
            None if bias is None else bias[branch],
            training,
            momentum,
            eps,
        )
        for branch, part in zip(present, parts, strict=True)
    ]
    return branches[0] if len(branches) == 1 else torch.cat(branches)


def _normalize_over_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    update_running_stats: bool,
    momentum: float,
    eps: float,
    group_name: str,
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    # Every process takes part in both branches' collectives, with zeros where it has no samples.
    branches = torch.split(wide, list(sizes))
    area = x.shape[2] * x.shape[3]
    counts = torch.cat([wide.new_full((1,), size * area) for size in sizes])
    counts = sum_over_group(counts, group_name)
    divisor = counts.clamp(min=1).unsqueeze(1)
    sums = torch.stack([branch.sum(dim=(0, 2, 3)) for branch in branches])
    mean = differentiable_sum_over_group(sums, group_name) / divisor
    centred = [
        branch - row[None, :, None, None] for branch, row in zip(branches, mean, strict=True)
    ]
    m2 = torch.stack([branch.square().sum(dim=(0, 2, 3)) for branch in centred])
    var = differentiable_sum_over_group(m2, group_name) / divisor
    if update_running_stats:
        with torch.no_grad():
            move_running_statistics(running_mean, running_var, mean, var, counts, momentum)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = torch.cat(
        [branch * row[None, :, None, None] for branch, row in zip(centred, scale, strict=True)]
    )
    if bias is not None:
        shift = [row.expand(size, -1) for row, size in zip(bias, sizes, strict=True)]
        y = y + torch.cat(shift)[:, :, None, None]
    return y.to(x.dtype)
