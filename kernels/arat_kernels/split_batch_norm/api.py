"""Public function: argument checks, choice of the implementation."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from arat_kernels.implementation import DTYPES, Impl, choose
from arat_kernels.split_batch_norm.reference import split_batch_norm_reference

if importlib.util.find_spec("triton"):
    from arat_kernels.split_batch_norm.triton import split_batch_norm_triton

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
    return_pooled: bool,
    group: ProcessGroup | None = ...,
    impl: Impl | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
        for name, size in zip(("clean", "adv"), sizes, strict=True):
            if size * x.shape[2] * x.shape[3] == 1:
                raise ValueError(
                    "training expects more than one value per channel and branch, got 1 in the "
                    f"{name} branch of x with shape {tuple(x.shape)}"
                )
    chosen = choose(impl, x, weight, bias, running_mean, running_var, residual)
    run = split_batch_norm_triton if chosen == "triton" else split_batch_norm_reference
    y, pooled = run(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        sizes,
        training=training,
        update_running_stats=update_running_stats,
        momentum=momentum,
        eps=eps,
        residual=residual,
        relu=relu,
        return_pooled=return_pooled,
        group_name=None if group is None else group.group_name,
    )
    if pooled is not None:
        return y, pooled
    return y


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
    expected = (2, x.shape[1])
    wide = x.dtype in (torch.float32, torch.float64)
    parameter_dtypes = (x.dtype,) if wide else (x.dtype, torch.float32)
    named = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be (2, C) = {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype not in parameter_dtypes:
            expected_dtypes = " or ".join(map(str, parameter_dtypes))
            raise ValueError(
                f"{name} must be {expected_dtypes} for an x of {x.dtype}, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {tensor.device}")
        if name.startswith("running") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    for one, other in (("weight", "bias"), ("running_mean", "running_var")):
        pair = named[one], named[other]
        if pair[0] is not None and pair[1] is not None and pair[0].dtype != pair[1].dtype:
            raise ValueError(f"{other} must be {pair[0].dtype} as {one}, got {pair[1].dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise ValueError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on {x.device} as x, got {residual.device}")
