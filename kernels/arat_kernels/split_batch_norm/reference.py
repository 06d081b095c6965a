"""Plain PyTorch definition of split BatchNorm; differentiable by autograd, any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.implementation import wide_dtype
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
    training: bool,
    update_running_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    return_pooled: bool,
    group_name: str | None,
    tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in :func:`arat_kernels.split_batch_norm.api.split_batch_norm`;
    ``tracked`` (2,), int64, counts the batches of each branch that move its running statistics."""
    affine = (weight, bias, running_mean, running_var)
    if training and group_name is not None:
        y = _normalize_over_group(
            x, *affine, sizes, update_running_stats, momentum, eps, group_name
        )
    else:
        use_running = not training or update_running_stats
        # Whole, or split: the gradient of a slice is a tensor of zeros in another layout.
        parts = x.split_with_sizes(sizes) if all(sizes) else (x,)
        branches = []
        for branch, part in enumerate(parts, 0 if sizes[0] else 1):
            # F.batch_norm without its check of the batch, which our callers make.
            normalized = torch.batch_norm(
                part,
                None if weight is None else weight[branch],
                None if bias is None else bias[branch],
                running_mean[branch] if use_running else None,
                running_var[branch] if use_running else None,
                training,
                momentum,
                eps,
                x.is_cuda and torch.backends.cudnn.enabled,
            )
            branches.append(normalized)
        y = branches[0] if len(branches) == 1 else torch.cat(branches)
    if training and update_running_stats and tracked is not None:
        (tracked if all(sizes) else tracked[0 if sizes[0] else 1]).add_(1)
    pooled = None
    if return_pooled:
        pooled = (y if y.element_size() > 2 else y.float()).relu().mean(dim=(2, 3))
    # In place: no backward reads the normalised value.
    if residual is not None:
        y += residual
    if relu:
        y.relu_()
    return y, pooled


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
    wide = x.to(wide_dtype(x))
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
