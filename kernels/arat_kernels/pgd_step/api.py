"""Public functions: argument checks, choice of the implementation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from arat_kernels.image_parts.reference import image_parts_reference
from arat_kernels.implementation import Impl, choose, interpreting
from arat_kernels.pgd_step.reference import STEPS, pgd_step_reference, random_start_reference

Norm = Literal["Linf", "L2", "L1"]


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    alpha: float,
    norm: Norm = "Linf",
    parts: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Move ``x_adv`` one step up the gradient, back into the ball around ``x`` and into [0, 1].

    Linf: ``x_adv += alpha * sign(grad)``, each element clamped to ``x ± eps``. L2:
    ``x_adv += alpha * grad / max(‖grad‖, 1e-12)``, then ``x_adv - x`` scaled down to length ``eps``
    where it is longer. L1: the twentieth of the components with the largest gradients moves along
    its sign, together by ``alpha``, and the result is the nearest point of ball and range at once.
    Norms are per sample, over all dimensions but the first. NaN in ``grad`` gives NaN in ``x_adv``
    (``torch.sign`` would make it 0 and hide it).

    Args:
        x_adv: (N, ...), float32 (the reference also takes float64), changed in place; contiguous or
            channels_last is fastest. With Triton any other layout, and memory that does not begin
            at a multiple of 16 bytes (a slice at an odd place), costs a copy in and one back.
        grad: shape of ``x_adv``, any floating-point dtype.
        x: shape and dtype of ``x_adv``, centre of the ball.
        eps: radius of the ball, finite and >= 0.
        alpha: length of the step, finite and >= 0.
        norm: "Linf", "L2" or "L1".
        parts: :func:`arat_kernels.image_parts.image_parts` of ``x_adv``, channels_last as
            ``x_adv`` is, brought up to date in place; ``grad`` is then that of the parts, whose
            first channels count.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        ``x_adv`` itself.

    Raises:
        ValueError: a shape, a dtype, a device or a value does not fit; the message holds got and
            expected.

    Source: Madry et al., ICLR 2018 (arXiv 1706.06083), section 2.1; L1: Croce and Hein, ICML 2021
    (arXiv 2103.01208), sections 3 and 4.2, with the sparsity of their adversarial training.
    """
    _check("x_adv", x_adv, norm, eps=eps, alpha=alpha)
    expected = x_adv.shape if parts is None else parts.shape
    if grad.shape != expected or not grad.is_floating_point():
        raise ValueError(
            f"grad must be a floating-point tensor of {'x_adv' if parts is None else 'parts'}'s "
            f"shape {tuple(expected)}, got {grad.dtype} of shape {tuple(grad.shape)}"
        )
    layout = torch.channels_last
    if parts is not None and not (
        x_adv.is_contiguous(memory_format=layout) and parts.is_contiguous(memory_format=layout)
    ):
        raise ValueError(f"with parts x_adv must be channels_last, got strides {x_adv.stride()}")
    if x.shape != x_adv.shape or x.dtype != x_adv.dtype:
        raise ValueError(
            f"x must be {x_adv.dtype} of shape {tuple(x_adv.shape)} as x_adv, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    with torch.no_grad():
        if impl != "reference" and choose(impl, x_adv, grad, x, operation="pgd_step") == "triton":
            _check_triton("x_adv", x_adv)
            from arat_kernels.pgd_step.triton import step

            step(x_adv, grad, x, parts, eps, alpha, norm)
        elif parts is None:
            pgd_step_reference(x_adv, grad, x, eps, alpha, norm)
        else:
            pgd_step_reference(x_adv, grad[:, : x.shape[1]], x, eps, alpha, norm)
            parts.copy_(image_parts_reference(x_adv))
    return x_adv


def random_start(
    x: Tensor,
    rng: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    first: int = 0,
    impl: Impl | None = None,
) -> Tensor:
    """A random point of the ball around ``x``; not clamped to [0, 1].

    Linf: every element of ``x_adv - x`` is uniform in [-eps, eps). L2: a normal direction, scaled
    per sample to a radius uniform in [0, eps). L1: the same with a Laplace direction. The numbers
    are a function of ``rng`` and of the position in memory, the same on every device; ``rng`` is
    read on the device and not changed, so advance it after use (``rng[1].add_(1)``), inside the
    CUDA graph if there is one.

    Args:
        x: (N, ...), float32 (the reference also takes float64).
        rng: (2,) int64 on ``x``'s device: seed and offset.
        eps: radius of the ball, finite and >= 0.
        norm: "Linf", "L2" or "L1".
        first: the place of ``x``'s first sample in a larger batch, >= 0: the parts of a batch, with
            the same ``rng``, get the numbers of the whole.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        ``x_adv``, shape, dtype and layout of ``x`` (contiguous if ``x`` is neither contiguous nor
        channels_last).

    Raises:
        ValueError: a shape, a dtype, a device or a value does not fit; the message holds got and
            expected.

    Source: Madry et al., ICLR 2018 (arXiv 1706.06083), section 2.1.
    """
    _check("x", x, norm, eps=eps)
    if first < 0:
        raise ValueError(f"first must be >= 0, got {first}")
    if impl != "reference" and choose(impl, x, rng, operation="random_start") == "triton":
        _check_triton("x", x)
        from arat_kernels.pgd_step.triton import start

        x_adv: Tensor = start(x.detach(), rng, eps, norm, first)
        return x_adv
    return random_start_reference(x.detach(), rng, eps, norm, first)


def _check(name: str, images: Tensor, norm: str, **lengths: float) -> None:
    if images.ndim < 2 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be (N, ...) of 2 or more dimensions, float32 or float64, "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if norm not in STEPS:
        raise ValueError(f"norm must be one of {', '.join(STEPS)}, got {norm!r}")
    for length, value in lengths.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{length} must be finite and >= 0, got {value}")


def _check_triton(name: str, t: Tensor) -> None:
    if t.dtype != torch.float32 and not interpreting():
        raise ValueError(
            f'{name} must be float32 with impl="triton", got {t.dtype}; pass impl="reference"'
        )
