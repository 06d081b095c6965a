"""Public function: argument checks, choice of the implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from arat_kernels.implementation import DTYPES, Impl, choose
from arat_kernels.split_batch_norm.reference import split_batch_norm_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def split_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    *,
    training: bool,
    update_running_stats: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    residual: Tensor | None = ...,
    relu: bool = ...,
    return_pooled: Literal[False] = ...,
    group: ProcessGroup | None = ...,
    impl: Impl | None = ...,
) -> Tensor: ...


@overload
def split_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    *,
    training: bool,
    update_running_stats: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    residual: Tensor | None = ...,
    relu: bool = ...,
    return_pooled: Literal[True],
    group: ProcessGroup | None = ...,
    impl: Impl | None = ...,
) -> tuple[Tensor, Tensor]: ...


def split_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    *,
    training: bool,
    update_running_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    return_pooled: bool = False,
    group: ProcessGroup | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the clean and the adversarial part of one batch, each with its own BatchNorm.

    ``y = [relu](batch_norm(x[:clean], branch 0) ++ batch_norm(x[clean:], branch 1) [+ residual])``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64; the first ``sizes[0]`` samples are
            clean, the other ``sizes[1]`` adversarial. With Triton channels_last is the fast layout;
            any other is copied to it first and the result copied back.
        weight, bias: (2, C), both in ``x``'s dtype, or in float32 for a 16-bit ``x``; row 0 for
            the clean branch, row 1 for the adversarial one; None is the identity. With Triton
            those of 16 bits are widened first.
        running_mean, running_var: (2, C), both in ``x``'s dtype, or in float32 for a 16-bit ``x``;
            same rows; changed in place when they are updated.
        sizes: (clean, adv) samples, summing to N; either may be 0, and that branch is untouched.
        training: True normalises with the statistics of the batch, False with the running ones.
        update_running_stats: with ``training``, whether the running statistics move.
        momentum: weight of the new batch in the running statistics, in [0, 1].
        eps: added to the variance, > 0.
        residual: shape and dtype of ``x``, added after the normalisation.
        relu: apply ReLU last.
        return_pooled: also return the mean over H and W of the ReLU of the normalised value
            *before* the residual, (N, C) in float32 (float64 for a float64 ``x``): the feature
            that ARAT regularises.
        group: with ``training``, the processes whose batches give the statistics together, each
            with the same C, H and W; a branch may be empty on some of them. The gradients of weight
            and bias are this process's own, as DistributedDataParallel expects. None: this process
            alone.
        impl: "triton", "reference", or None: Triton for CUDA tensors, the reference otherwise.

    Returns:
        ``y``, shape and dtype of ``x``; with ``return_pooled`` the pair ``(y, pooled)``.

    Raises:
        ValueError: a shape, a size, a dtype, a device or ``impl`` does not fit, or a branch in
            training has one value per channel; the message holds got and expected.

    Source: Waseda et al., ICLR 2025 (arXiv 2402.14648), section 4, split BatchNorm.
    """
    _check(x, weight, bias, running_mean, running_var, sizes, momentum, eps, residual)
    if training and group is None:
        check_counts(x, sizes)
    tensors = x, weight, bias, running_mean, running_var, residual
    run = split_batch_norm_reference
    if choose(impl, *tensors, operation="split_batch_norm") == "triton":
        from arat_kernels.split_batch_norm.triton import split_batch_norm_triton

        run = split_batch_norm_triton
    y, pooled = run(
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
        residual,
        relu,
        return_pooled,
        None if group is None else group.group_name,
    )
    return y if pooled is None else (y, pooled)


def check_counts(x: Tensor, sizes: tuple[int, int]) -> None:
    """Raise ValueError where a branch has one value per channel, whose variance is none."""
    for name, size in zip(("clean", "adv"), sizes, strict=True):
        if size * x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                "training expects more than one value per channel and branch, got 1 in the "
                f"{name} branch of x with shape {tuple(x.shape)}"
            )


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    momentum: float,
    eps: float,
    residual: Tensor | None,
) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be (N, C, H, W) and not empty, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be a floating-point tensor of {DTYPES}, got {x.dtype}")
    if len(sizes) != 2 or min(sizes) < 0 or sum(sizes) != x.shape[0]:
        raise ValueError(f"sizes (clean, adv) must sum to N = {x.shape[0]}, got {tuple(sizes)}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if not eps > 0.0:
        raise ValueError(f"eps must be > 0, got {eps}")
    dtypes = {x.dtype} if x.dtype in (torch.float32, torch.float64) else {x.dtype, torch.float32}
    for kind, pair in (
        ("weight and bias", (weight, bias)),
        ("running_mean and running_var", (running_mean, running_var)),
    ):
        given = [tensor for tensor in pair if tensor is not None]
        for tensor in given:
            if tuple(tensor.shape) != (2, x.shape[1]):
                raise ValueError(
                    f"{kind} must be (2, C) = {(2, x.shape[1])}, got {tuple(tensor.shape)}"
                )
            if tensor.dtype not in dtypes or tensor.dtype != given[0].dtype:
                raise ValueError(
                    f"{kind} must have one dtype of {dtypes} for an x of {x.dtype}, "
                    f"got {[other.dtype for other in given]}"
                )
    if not (running_mean.is_contiguous() and running_var.is_contiguous()):
        raise ValueError(
            "running_mean and running_var must be contiguous, "
            f"got strides {running_mean.stride()} and {running_var.stride()}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} of shape {tuple(x.shape)} as x, "
            f"got {residual.dtype} of shape {tuple(residual.shape)}"
        )
