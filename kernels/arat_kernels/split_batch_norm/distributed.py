"""Batch statistics over the processes of a torch.distributed group: sum, centred squares, count."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def sum_over_group(value: Tensor, group_name: str) -> Tensor:
    """The sum of every process's ``value``; not differentiable."""
    from torch.distributed import _functional_collectives as collectives

    # A group's name is a str to the operator behind this function, a NewType to the type checker.
    total = collectives.all_reduce(value, "sum", cast(Any, group_name))
    return _wait(total)


def _wait(value: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    waited: Tensor = collectives.wait_tensor(value)  # type: ignore[no-untyped-call]
    return waited


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return sum_over_group(value, group_name)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return sum_over_group(upstream, ctx.group_name), None


def differentiable_sum_over_group(value: Tensor, group_name: str) -> Tensor:
    """:func:`sum_over_group` whose gradient is the sum of every process's upstream gradient."""
    total: Tensor = _SumOverGroup.apply(value, group_name)  # type: ignore[no-untyped-call]
    return total


def gather_statistics(
    mean: Tensor, var: Tensor, rows: tuple[int, int], group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge every process's statistics with one collective.

    Args:
        mean, var: (2, C), this process's mean and biased variance of each branch.
        rows: the number of values behind them, per branch; 0 for an empty branch.

    Returns:
        mean and biased variance (2, C) and counts (2,) over the group, in ``mean``'s dtype.
    """
    from torch.distributed import _functional_collectives as collectives

    count = torch.cat([mean.new_full((1, 1), number) for number in rows])
    packed = torch.cat([mean, var * count, count], dim=1).unsqueeze(0)
    gathered = _wait(collectives.all_gather_tensor(packed, 0, cast(Any, group_name)))
    channels = mean.shape[1]
    means, m2, counts = torch.split(gathered, [channels, channels, 1], dim=2)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    # Means are near each other: their differences keep all digits.
    shift = means[:1]
    mean = (shift + ((means - shift) * share).sum(0, keepdim=True)).squeeze(0)
    m2 = (m2 + (means - mean).square() * counts).sum(0)
    return mean, m2 / total.clamp(min=1), total.squeeze(1)


def move_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    counts: Tensor,
    momentum: float,
) -> None:
    """Move the running statistics (2, C) in place, as BatchNorm does; empty branches stay.

    Args:
        mean, var: (2, C), mean and biased variance of the batch.
        counts: (2,), the number of values behind them.
    """
    count = counts.unsqueeze(1)
    share = (count > 0).to(mean.dtype) * momentum
    unbiased = var * (count / (count - 1).clamp(min=1))
    running_mean.lerp_(mean.to(running_mean.dtype), share.to(running_mean.dtype))
    running_var.lerp_(unbiased.to(running_var.dtype), share.to(running_var.dtype))


def batch_norm_over_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group_name: str,
) -> Tensor:
    """Ordinary BatchNorm in training with the statistics of every process's ``x``; plain PyTorch.

    Args:
        x: (N, C, ...), with an N of its own on every process, 0 included.
        weight, bias: (C,), or None for the identity.
        running_mean, running_var: (C,), moved in place; None for none.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance, > 0.
        group_name: of the processes.

    Returns:
        Shape and dtype of ``x``; gradients of weight and bias are this process's own.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    count = sum_over_group(wide.new_full((1,), x.numel() // x.shape[1]), group_name)
    mean = differentiable_sum_over_group(wide.sum(dims), group_name) / count
    centred = wide - mean.view(shape)
    var = differentiable_sum_over_group(centred.square().sum(dims), group_name) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = centred * scale.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)
