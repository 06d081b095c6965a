"""Public functions: argument checks, choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.frozen_affine.reference import frozen_affine_reference, relu_backward_reference
from arat_kernels.implementation import DTYPES, Impl, choose


def frozen_affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    impl: Impl | None = None,
) -> Tensor:
    """``y = [relu](x * scale + shift [+ residual])`` with constants per channel.

    This is BatchNorm in eval mode (``scale = weight / sqrt(running_var + eps)``,
    ``shift = bias - running_mean * scale``), or with ``scale=None`` the end of a convolution that
    the BatchNorm was folded into. The backward reads a bit of each output, or with ``scale=None``
    the output, and gives ``x`` and ``residual`` a gradient, then one tensor, written once.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; channels_last is fastest.
        scale: (C,), any of the same dtypes, or None for 1. With Triton constants that are not
            float32 (float64 for float64 ``x``) are converted to it first.
        shift: (C,), as ``scale``.
        residual: shape and dtype of ``x``, added before the ReLU.
        relu: whether ReLU comes last.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        ``y``, shape, dtype and layout of ``x``; computed in float32 (float64 for float64 ``x``).

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or ``scale`` or ``shift`` expects a
            gradient; the message holds got and expected.

    Source: Ioffe and Szegedy, ICML 2015 (arXiv 1502.03167), algorithm 2, step 11.
    """
    _check_images("x", x)
    _check_constants(x.shape[1], scale=scale, shift=shift)
    if residual is not None:
        _check_like("residual", residual, "x", x)
    if choose(impl, x, scale, shift, residual, operation="frozen_affine") == "triton":
        from arat_kernels.frozen_affine.triton import frozen_affine_triton

        return frozen_affine_triton(x, scale, shift, residual, relu)[0]
    return frozen_affine_reference(x, scale, shift, residual, relu)


def add_frozen_affine(
    x: Tensor, addend: Tensor, scale: Tensor, shift: Tensor, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """``relu((x + addend) * scale + shift)`` and ``x + addend`` itself, in one pass.

    What ends one pre-activation block and begins the next. The sum is rounded to the dtype of ``x``
    before it goes on; the gradients of both results are added in one pass too.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64; channels_last is fastest.
        addend: shape and dtype of ``x``.
        scale, shift, impl: as for :func:`frozen_affine`.

    Returns:
        The normalised sum after ReLU, and the sum; shape, dtype and layout of ``x``.

    Raises:
        ValueError: as :func:`frozen_affine`.
    """
    _check_images("x", x)
    _check_like("addend", addend, "x", x)
    _check_constants(x.shape[1], scale=scale, shift=shift)
    if choose(impl, x, addend, scale, shift, operation="frozen_affine") == "triton":
        from arat_kernels.frozen_affine.triton import frozen_affine_triton

        return frozen_affine_triton(x, scale, shift, None, True, addend)
    summed = x + addend
    return frozen_affine_reference(summed, scale, shift, None, True), summed


def relu_backward(
    dy: Tensor, y: Tensor, *, dy_skip: Tensor | None = None, impl: Impl | None = None
) -> Tensor:
    """``(dy [+ dy_skip])`` where ``y = relu(...)`` is positive, else 0, in one pass.

    For ``y = relu(conv(a) + bias [+ residual])``, with the bias of a folded BatchNorm, the result
    is at once the gradient of the convolution's output and that of the residual. ``dy_skip`` takes
    the second gradient that reaches ``y`` where a block's output feeds both a convolution and a
    skip connection, which autograd would add in a pass of its own.

    Args:
        dy: (N, C, ...), gradient of ``y``, float16, bfloat16, float32 or float64.
        y: shape and dtype of ``dy``, the saved output.
        dy_skip: dtype of ``dy``, a second gradient of ``y``: of its shape, or that of
            ``dy[:, :, ::2, ::2]``, of every second pixel (:func:`arat_kernels.forks.read_by`).
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        The gradient, shape and dtype of ``y``; the sum is formed in float32. Not differentiable.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the message holds got and expected.
    """
    _check_images("y", y)
    _check_like("dy", dy, "y", y)
    if dy_skip is not None:
        few = y.ndim == 4 and dy_skip.shape == y[:, :, ::2, ::2].shape
        _check_like("dy_skip", dy_skip, "y", y[:, :, ::2, ::2] if few else y)
    implementation = choose(impl, dy, y, dy_skip, operation="relu_backward")
    with torch.no_grad():
        if implementation == "triton":
            from arat_kernels.frozen_affine.triton import backward

            grad: Tensor = backward(dy, dy_skip, None, y, None, True, False)[0]
            return grad
        return relu_backward_reference(dy, y, dy_skip)


def _check_images(name: str, t: Tensor) -> None:
    if t.ndim < 2 or t.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be (N, C, ...) of one of {DTYPES}, "
            f"got {t.dtype} of shape {tuple(t.shape)}"
        )


def _check_constants(channels: int, **constants: Tensor | None) -> None:
    for name, constant in constants.items():
        if constant is None:
            continue
        if tuple(constant.shape) != (channels,) or constant.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be (C,) = ({channels},) of one of {DTYPES}, "
                f"got {constant.dtype} of shape {tuple(constant.shape)}"
            )
        if constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} is a constant here and gets no gradient, got one that requires it; "
                "pass it detached"
            )


def _check_like(name: str, t: Tensor, model_name: str, model: Tensor) -> None:
    if t.shape != model.shape or t.dtype != model.dtype:
        raise ValueError(
            f"{name} must be {model.dtype} of shape {tuple(model.shape)} as {model_name}, "
            f"got {t.dtype} of shape {tuple(t.shape)}"
        )
